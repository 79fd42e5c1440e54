"""The public rStar-Math code, repeated: every golden vector that was recorded by running it."""

import pytest
from search_case import VECTORS, candidate, run_snippet, searched

from smallmath_jax.search import interpreter, rstar
from smallmath_jax.search.settings import rstar_settings
from smallmath_jax.search.tree import LiveNode, backup, q_value, uct, update
from smallmath_jax.search.vote import best_by_rollout


def vector(name):
    return VECTORS[name]["input"], VECTORS[name]["output"]


def test_uct_grid():
    cases, expected = vector("uct_grid")
    for case, bound in zip(cases, expected, strict=True):
        parent = LiveNode(visit_count=case["parent_n"])
        node = LiveNode(
            parent=parent, visit_count=case["n"], value_sum=case["n"] * case["q"], kind="open"
        )
        assert uct(node, case["c"]) == pytest.approx(bound, abs=1e-12)
    assert uct(LiveNode(visit_count=5, value_sum=3.0), 2.0) == 0.0


def test_backprop_chain():
    given, expected = vector("backprop_chain")
    root = LiveNode()
    a = LiveNode(parent=root)
    nodes = {"root": root, "a": a, "b": LiveNode(parent=a)}
    for kind, name, value in given["ops"]:
        (update if kind == "update" else backup)(nodes[name], value)
    for name, node in nodes.items():
        assert node.visit_count == expected[name]["N"]
        assert q_value(node) == pytest.approx(expected[name]["Q"], abs=1e-15)


def first_values(tree):
    """The reference's `value`, recomputed: a score, the -1 of a failure, or the first answer's reward below."""
    answers = [node for node in tree.nodes if node.kind == "answer" and node.visit_count]
    found = {}
    for node in tree.nodes:
        below = [
            one for one in answers if one.tag == node.tag or one.tag.startswith(node.tag + ".")
        ]
        first = below[0].q_value if below else 0
        failed = -1.0 if node.kind in ("error", "too_deep") else None
        found[node.tag] = next(value for value in (node.score, failed, first) if value is not None)
    return found


FINAL = {kind: text for text, kind in rstar.FAILURES.items()}


def check_walk(tree, expected, settings):
    by_tag = {node.tag: node for node in tree.nodes}
    assert list(by_tag) != [] and set(by_tag) == set(expected["nodes"])
    values, exhausted = first_values(tree), tree.extra["exhausted"]
    label = lambda tag: None if tag is None else expected["nodes"][tag]["label"]
    for tag, want in expected["nodes"].items():
        node = by_tag[tag]
        assert tag.count(".") == want["depth"]
        terminal = tag in exhausted or node.kind not in ("root", "open")
        assert terminal == want["terminal"], tag
        assert (node.answer or FINAL.get(node.kind, "")) == want["final"]
        assert node.errors == want["errs"]
        assert values[tag] == pytest.approx(want["value"])
        assert node.visit_count == want["N"], tag
        assert node.q_value == pytest.approx(want["Q"], abs=1e-12), tag
        live = LiveNode(visit_count=node.visit_count, value_sum=node.value_sum)
        if node.parent:
            live.parent = LiveNode(visit_count=by_tag[node.parent].visit_count)
        assert uct(live, settings.exploration) == pytest.approx(want["uct"], abs=1e-12)
    walks = [[label(tag) for tag in walk] for walk in tree.extra["walks"]]
    assert walks == expected["walk_per_rollout"]


def test_mcts_terminal_guided():
    given, expected = vector("mcts_terminal_guided_it2")
    settings, calls = rstar_settings(rollouts=given["iterations"], max_errors=2), []
    tree = searched(given["policy"], settings, gold=given["gt"], calls=calls)
    check_walk(tree, expected, settings)
    assert calls == expected["generate_calls"]


@pytest.mark.parametrize("name", ["mcts_ppm_sampling_it1", "mcts_ppm_sampling_it3"])
def test_mcts_ppm_sampling(name):
    given, expected = vector(name)
    settings = rstar_settings(rollouts=given["iterations"], guidance="ppm")
    tree = searched(given["policy"], settings, gold=given["gt"], ppm=given["ppm"])
    check_walk(tree, expected, settings)


@pytest.mark.parametrize("name", ["mcts_eval_it1", "mcts_eval_it3"])
def test_mcts_evaluation(name):
    given, expected = vector(name)
    policy = VECTORS["mcts_ppm_sampling_it1"]["input"]["policy"]
    settings = rstar_settings(rollouts=given["iterations"], guidance="ppm", use_gold=False)
    tree = searched(policy, settings, gold=given["gt"], ppm=given["ppm"])
    check_walk(tree, expected, settings)
    best, metric = best_by_rollout(tree), expected["intermediate_metric"]
    assert list(best) == metric["rollout_indexs"]
    assert [ballot.answer for ballot in best.values()] == metric["answers"]
    assert [ballot.answer == given["gt"] for ballot in best.values()] == metric["judgements"]
    assert [ballot.score for ballot in best.values()] == pytest.approx(metric["value_estimate"])


def test_error_text_double_wrap():
    given, expected = vector("error_text_double_wrap")
    node = searched(given["policy"], rstar_settings(rollouts=1)).nodes[1]
    assert node.text == expected["text"]
    assert FINAL[node.kind] == expected["final"]


def test_error_substring():
    given, expected = vector("error_substring")
    root, node = searched(given["policy"], rstar_settings(rollouts=1)).nodes
    assert node.output.strip() == expected["obs"] and FINAL[node.kind] == expected["final"]
    assert (node.visit_count, node.q_value) == (expected["N"], expected["Q"])
    assert root.visit_count == expected["root_N"]


def test_candidate_filter():
    for given, expected in zip(*vector("candidate_filter"), strict=True):
        kept = rstar.filter_candidates([candidate(text, mark) for text, mark in given])
        assert [one.text for one in kept.candidates] == [text + mark for text, mark in expected]


def test_answer_extraction():
    for text, expected in zip(*vector("answer_extraction"), strict=True):
        step = rstar.read_step(text)
        assert (step.answer or "") == expected["final_answer"]
        assert (step.kind == "answer") == bool(expected["final_answer"])
        assert step.runs == bool(expected["action"])


def test_prompt_zero_shot():
    given, expected = vector("prompt_zero_shot")
    prompts = [rstar.prompt(given["question"], partial) for partial in given["partials"]]
    assert prompts == expected


def test_extract_program():
    given, expected = vector("extract_program")
    assert [rstar.extract_program(text) for text in given] == expected


def test_state_leak():
    given, expected = vector("state_leak")
    shared = {}
    leaking = [interpreter.observe(code, shared).strip() for code in given]
    assert leaking == expected
    programs = [rstar.observing(code) for code in given]
    assert "NameError" in run_snippet("", programs[1]).stdout


def test_history_stop():
    _, expected = vector("history_stop")
    first = LiveNode(parent=LiveNode(), text=expected[0][0])
    second = LiveNode(parent=first, text="\nprint(x)\n<end_of_code>\n<output>1<end_of_output>")
    assert [rstar.history(first), rstar.history(second)] == expected
