"""The default search: values recomputed from the leaves, no wasted rollout, resuming, isolation, stopping, presets."""

import asyncio
import collections
import dataclasses
import hashlib
import json
import math
import random

import numpy as np
import pytest
from search_case import (
    ENDINGS,
    answer,
    append,
    candidate,
    encode,
    grader,
    labels,
    problem,
    run_code,
    searched,
    step,
)

from smallmath_jax import records
from smallmath_jax.search import settings as presets
from smallmath_jax.search.beam import beam_search, sample_chains
from smallmath_jax.search.mcts import search, search_seeds
from smallmath_jax.search.settings import SearchSettings, more_rollouts, rstar_settings
from smallmath_jax.search.steps import CodeResult
from smallmath_jax.search.tree import (
    LiveNode,
    from_record,
    policy_share,
    q_value,
    to_record,
    tree_from_json,
    uct,
)


def draws(*parts):
    return random.Random(hashlib.sha256(repr(parts).encode()).digest())


def latent(seed, depth=4, keep=0.6, fail=0.1):
    """A policy whose steps keep or lose the way to the right answer 3; the keys of each draw decide."""

    async def generate(handle, n, keys):
        names = labels(handle)
        if "<end_of_code>" in handle:
            value = 3 if all(name[0] == "g" for name in names) else 4
            return [candidate(*answer("a", value)) for _ in range(n)]
        last = len(names) + 1 >= depth
        found = []
        for key in keys:
            rng = draws(seed, tuple(key.tolist()))
            name = ("g" if rng.random() < keep else "b") + ("e" if rng.random() < fail else "x")
            name += str(rng.randrange(10**6))
            mark = "<end_of_code>" if last else "<end_of_step>"
            found.append(candidate(*step(name, mark=mark), log_prob=-rng.random()))
        return found

    return generate


async def fake_run(snippets):
    """Runs nothing: a step labelled .e... fails."""
    failed = CodeResult("error", "", "Traceback\nValueError: no")
    return [
        failed if labels(code)[-1][1] == "e" else CodeResult("ok", "1\n") for _, code in snippets
    ]


async def fake_score(handles):
    return [draws("score", handle).uniform(-1, 1) for handle in handles]


def grown(settings, seed=0, name="p", tree=None, **policy):
    return asyncio.run(start(settings, seed, name, tree, **policy))


def start(settings, seed=0, name="p", tree=None, **policy):
    return search(
        problem(name=name),
        "",
        settings=settings,
        tree=tree,
        generate=latent(seed, **policy),
        append=append,
        encode=encode,
        run_code=fake_run,
        score=fake_score if settings.guidance == "ppm" or not settings.use_gold else None,
        grade=grader("3") if settings.use_gold else None,
    )


@pytest.mark.parametrize("guidance", ["terminal", "ppm"])
@pytest.mark.parametrize("compat", [False, True])
def test_visits_and_values_are_those_of_the_answers_below(guidance, compat):
    make = rstar_settings if compat else SearchSettings
    for seed in range(4):
        tree = grown(make(rollouts=12, candidates=4, guidance=guidance), seed)
        assert tree.stopped in ("rollouts", "exhausted")
        for node in tree.nodes:
            below = [
                one
                for one in tree.nodes
                if one.kind == "answer" and (one.tag + ".").startswith(node.tag + ".")
            ]
            values = [1.0 if one.verdict == "correct" else -1.0 for one in below]
            values += [node.score] if node.score is not None else []
            values += [-1.0] if node.kind in ("error", "too_deep", "invalid") else []
            assert node.visit_count == len(values)
            assert node.value_sum == pytest.approx(sum(values), abs=1e-12)


def test_uct_against_the_formula_written_out():
    rng = np.random.default_rng(0)
    for _ in range(200):
        above, visits = rng.integers(0, 30, 2)
        total, c = rng.normal() * visits, rng.uniform(0, 3)
        node = LiveNode(
            parent=LiveNode(visit_count=int(above)), visit_count=int(visits), value_sum=total
        )
        explore = c * np.sqrt(np.log(above) / visits) if above and visits else 0
        mean = total / visits if visits else 0
        assert uct(node, c) == pytest.approx(mean + explore, abs=1e-12)
        assert uct(node, c, "first") == (math.inf if not visits else uct(node, c))
    assert uct(LiveNode(parent=LiveNode()), 2.0, "first") == math.inf


def test_prior_prefers_what_the_policy_finds_likely():
    parent = LiveNode(visit_count=4)
    likely, unlikely = (LiveNode(parent=parent, log_prob=p, written=10) for p in (-1.0, -20.0))
    parent.children = [likely, unlikely]
    shares = [policy_share(child) for child in parent.children]
    assert sum(shares) == pytest.approx(1) and shares[0] > shares[1]
    assert shares[0] / shares[1] == pytest.approx(math.exp(1.9))
    assert uct(likely, 2.0, prior=1.0) == pytest.approx(shares[0] * 2)
    assert uct(likely, 2.0) == 0


def test_lazy_exhaustion_wastes_rollouts_in_compat_and_none_by_default():
    # The measurement of the reference: random trees, 16 rollouts of 8 candidates, outcomes alone
    taken = wasted = explored = 0
    for seed in range(12):
        tree = grown(rstar_settings(rollouts=16, candidates=8), seed, depth=3, fail=0.6)
        taken, wasted = taken + tree.rollouts, wasted + tree.wasted
        ours = grown(SearchSettings(rollouts=16, candidates=8), seed, depth=3, fail=0.6)
        assert ours.wasted == 0
        assert all(len(walk) for walk in ours.extra["walks"])
        explored += sum(bool(tags) for tags in ours.extra["walks"])
    assert 0.10 < wasted / taken < 0.45, wasted / taken


def test_unvisited_first_looks_at_siblings_that_zero_leaves_out():
    def explored(settings):
        tree = grown(settings, seed=3, keep=0.9, fail=0.0)
        return sum(node.tag.count(".") == 2 and node.tag.endswith(".1") for node in tree.nodes)

    fields = {"rollouts": 8, "candidates": 5}
    assert explored(SearchSettings(**fields)) == 5
    assert explored(SearchSettings(**fields, unvisited="zero")) == 1
    assert explored(rstar_settings(**fields)) == 1


def test_a_search_goes_on_from_its_record_as_if_it_had_never_stopped():
    for guidance, make in (
        ("terminal", SearchSettings),
        ("ppm", SearchSettings),
        ("ppm", rstar_settings),
    ):
        settings = make(rollouts=4, candidates=4, guidance=guidance)
        longer = dataclasses.replace(settings, rollouts=20)
        whole = grown(longer)
        stored = json.loads(records.to_json(grown(settings)))
        assert grown(longer, tree=tree_from_json(stored)) == whole
        assert whole.rollouts > 4


def test_records_and_live_trees_hold_the_same():
    settings = SearchSettings(rollouts=6, candidates=4, guidance="ppm", score_visits=0)
    tree = grown(settings)
    back = to_record(
        from_record(tree), problem(), settings, stopped=tree.stopped, chosen=tree.chosen
    )
    assert back == tree and tree_from_json(json.loads(records.to_json(tree))) == tree
    torn = dataclasses.replace(tree, nodes=[*tree.nodes, tree.nodes[3]])
    with pytest.raises(ValueError, match="comes before its parent, or twice"):
        from_record(torn)
    with pytest.raises(ValueError, match="not even a root"):
        from_record(dataclasses.replace(tree, nodes=[]))


def test_a_tree_does_not_depend_on_its_neighbours_or_on_their_order():
    settings = SearchSettings(rollouts=6, candidates=4, guidance="ppm")
    names = [f"p{number}" for number in range(6)]

    async def together(order):
        trees = await asyncio.gather(*(start(settings, 0, name) for name in order))
        return {tree.problem_id: tree for tree in trees}

    first = asyncio.run(together(names))
    assert asyncio.run(together(names[::-1])) == first
    assert grown(settings, 0, "p3") == first["p3"]
    assert len({tree.nodes[1].text for tree in first.values()}) > 1


def test_keys_name_seed_problem_round_node_and_sample():
    asked = {}

    async def generate(handle, n, keys):
        asked[handle] = keys
        return await latent(0)(handle, n, keys)

    tree = searched(
        generate, SearchSettings(rollouts=2, candidates=3, seed=5, round=2), run_code=fake_run
    )
    path = {"": ""} | {}
    texts = {node.tag: "" for node in tree.nodes}
    for node in tree.nodes[1:]:
        texts[node.tag] = texts[node.parent] + node.text
    path = {texts[tag]: tag for tag in texts}
    for handle, keys in asked.items():
        for sample, key in enumerate(keys):
            expected = records.draw_key(5, "p", 2, path[handle], sample)
            np.testing.assert_array_equal(key, expected)


def test_a_stuck_problem_delays_only_itself():
    async def run():
        release, finished = asyncio.Event(), []

        async def generate(handle, n, keys):
            await release.wait()
            return await latent(0)(handle, n, keys)

        settings = SearchSettings(rollouts=3, candidates=3)
        stuck = asyncio.ensure_future(
            search(
                problem(name="stuck"),
                "",
                settings=settings,
                generate=generate,
                append=append,
                encode=encode,
                run_code=fake_run,
                grade=grader("3"),
            )
        )
        for name in ("a", "b"):
            finished.append((await start(settings, 0, name)).stopped)
        assert not stuck.done()
        release.set()
        return finished, await stuck

    finished, stuck = asyncio.run(run())
    assert "failed" not in finished and stuck.stopped != "failed"


def test_the_gold_answer_changes_nothing_in_evaluation():
    settings = SearchSettings(rollouts=6, candidates=4, guidance="ppm", use_gold=False)
    policy = {"generate": latent(0), "append": append, "encode": encode, "run_code": fake_run}
    trees = [
        asyncio.run(search(problem(gold), "", settings=settings, score=fake_score, **policy))
        for gold in ("3", "4")
    ]
    assert [tree.gold for tree in trees] == ["3", "4"]
    assert trees[0] == dataclasses.replace(trees[1], gold="3")
    assert all(node.verdict == "" for node in trees[0].nodes)
    with pytest.raises(ValueError, match="never sees the gold"):
        searched({}, settings, grade=grader("3"), ppm={"a": 1})
    with pytest.raises(ValueError, match="never sees the gold"):
        searched({}, SearchSettings(), grade=None)
    with pytest.raises(ValueError, match="needs a preference model"):
        searched({}, SearchSettings(guidance="ppm"))


def test_evaluation_without_a_preference_model_still_moves_on():
    settings = SearchSettings(rollouts=12, candidates=3, use_gold=False, choose="votes")
    tree = searched(latent(1, fail=0.0), settings, run_code=fake_run)
    answers = [node for node in tree.nodes if node.kind == "answer"]
    assert len({node.tag.split(".")[1] for node in answers}) == 3
    assert tree.nodes[0].visit_count == len(answers) == 12


def test_score_that_counts_no_visit():
    tree = grown(SearchSettings(rollouts=3, candidates=3, guidance="ppm", score_visits=0))
    unvisited = [node for node in tree.nodes if node.kind == "open" and not node.visit_count]
    assert unvisited and all(node.q_value == node.score for node in unvisited)
    assert [q_value(node) for node in from_record(tree).nodes] == [
        one.q_value for one in tree.nodes
    ]
    first = [node for node in tree.nodes if node.parent == "0" and node.kind == "open"]
    assert tree.extra["walks"][0][1] == max(first, key=lambda node: node.score).tag
    root = tree.nodes[0]
    assert root.visit_count == sum(node.kind == "answer" for node in tree.nodes)


def test_dead_ends_and_discarded_errors():
    dying = {"": [step("be1"), step("be2")]}
    tree = searched(dying, SearchSettings(rollouts=4), run_code=fake_run)
    assert (tree.stopped, tree.rollouts, tree.nodes[0].visit_count) == ("exhausted", 1, 0)
    assert [node.kind for node in tree.nodes[1:]] == ["error", "error"]
    tree = searched(dying, SearchSettings(rollouts=4, dead_end=-1.0), run_code=fake_run)
    assert (tree.nodes[0].visit_count, tree.nodes[0].q_value) == (1, -1.0)
    tree = searched(dying, SearchSettings(rollouts=4, errors="discard"), run_code=fake_run)
    assert (len(tree.nodes), tree.extra["discarded"], tree.stopped) == (1, 2, "exhausted")


def test_answers_that_cannot_be_graded_count_nowhere():
    async def grade(text):
        return "timeout"

    tree = searched({"": [answer("a", 3)]}, SearchSettings(), grade=grade)
    assert [(node.visit_count, node.verdict) for node in tree.nodes] == [(0, ""), (0, "timeout")]


def voting(values, settings):
    """Answers come in the order of `values`, one a rollout."""
    policy = {"": [step(f"s{index}") for index in range(len(values))]}
    policy |= {f"s{index}": [answer(f"a{index}", value)] for index, value in enumerate(values)}
    return searched(policy, settings)


def test_stopping_when_the_vote_is_decided():
    fields = {"rollouts": 8, "candidates": 8, "use_gold": False, "choose": "votes"}
    tree = voting([1, 2, 2, 2, 2, 2, 1, 1], SearchSettings(**fields, stop="decided"))
    # After 6 rollouts 5 : 1 with 2 to come
    assert (tree.stopped, tree.rollouts) == ("decided", 6)
    assert tree.extra["rollouts_saved"] == 2
    assert tree.extra["tokens_saved"] == round(2 * tree.tokens / 6)
    whole = voting([1, 2, 2, 2, 2, 2, 1, 1], SearchSettings(**fields))
    by_tag = {node.tag: node for node in [*tree.nodes, *whole.nodes]}
    assert by_tag[tree.chosen].answer == by_tag[whole.chosen].answer == "2"
    tie = voting([1, 2, 1, 2, 1, 2, 1, 2], SearchSettings(**fields, stop="decided"))
    assert tie.rollouts == 8


def test_no_early_stop_ever_changes_the_answer_voted_for():
    rng = random.Random(0)
    saved = 0
    for _ in range(40):
        values = [rng.choice([1, 1, 1, 2, 3]) for _ in range(7)]
        fields = {"rollouts": 7, "candidates": 7, "use_gold": False, "choose": "votes"}
        early, whole = (
            voting(values, SearchSettings(**fields, stop=stop)) for stop in ("decided", "rollouts")
        )
        named = lambda tree: next(node.answer for node in tree.nodes if node.tag == tree.chosen)
        assert named(early) == named(whole)
        saved += early.extra.get("rollouts_saved", 0)
    assert saved > 20


def test_stopping_with_confidence():
    fields = {"rollouts": 16, "candidates": 16, "use_gold": False, "choose": "votes"}
    tree = voting([5] * 16, SearchSettings(**fields, stop="confident"))
    assert (tree.stopped, tree.rollouts) == ("confident", 4)  # 1 - 0.5^5 = 0.969
    with pytest.raises(ValueError, match="counts votes"):
        SearchSettings(stop="confident")
    with pytest.raises(ValueError, match="would never end a search"):
        SearchSettings(stop="decided", use_gold=False)


def test_published_numbers():
    rounds = [presets.preset(f"round{number}") for number in (1, 2, 3, 4)]
    assert [one.rollouts for one in rounds] == [8, 16, 16, 16]
    assert [one.candidates for one in rounds] == [5, 8, 8, 16]
    assert [one.guidance for one in rounds] == ["terminal", "terminal", "ppm", "ppm"]
    assert {(one.exploration, one.max_depth) for one in rounds} == {(2.0, 16)}
    test = presets.preset("test")
    assert (test.rollouts, test.candidates, test.use_gold) == (12, 32, False)
    assert (presets.TEST_SEARCHES, presets.TEST_TOP_K) == (64, 4)
    assert [more_rollouts(done, False) for done in (16, 64, 128)] == [64, 128, 0]
    assert more_rollouts(16, solved=True) == 0
    with pytest.raises(ValueError, match="round1, round2"):
        presets.preset("round5")


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance": "pmm"},
        {"unvisited": "last"},
        {"choose": "max"},
        {"stop": "never"},
        {"rollouts": 0},
        {"score_visits": 2},
        {"confidence": 1.0},
        {"compat": "rstar"},
    ],
)
def test_settings_that_make_no_sense_are_refused(fields):
    with pytest.raises(
        ValueError, match=f"search.{'unvisited' if 'compat' in fields else [*fields][0]}"
    ):
        SearchSettings(**fields)


def test_many_searches_of_one_problem_differ_in_their_seeds():
    settings = SearchSettings(rollouts=2, candidates=3, seed=7)
    policy = {"generate": latent(0), "append": append, "encode": encode, "run_code": fake_run}
    seeds = search_seeds(7, 4)
    each = [dataclasses.replace(settings, seed=seed) for seed in seeds]
    grow = lambda one: asyncio.run(search(problem(), "", settings=one, grade=grader("3"), **policy))
    trees = [grow(one) for one in each]
    assert [tree.seed for tree in trees] == seeds and trees[0].seed == 7
    assert len({tree.nodes[1].text for tree in trees}) == 4
    assert set(search_seeds(8, 4)).isdisjoint(search_seeds(7, 4))


def test_beam_takes_the_best_living_steps_of_each_level():
    settings = SearchSettings(candidates=4, guidance="ppm", use_gold=False)
    policy = {"generate": latent(2), "append": append, "encode": encode, "run_code": fake_run}
    tree = asyncio.run(
        beam_search(problem(), "", width=3, settings=settings, score=fake_score, **policy)
    )
    by_tag = {node.tag: node for node in tree.nodes}
    for level, following in zip(tree.extra["walks"], tree.extra["walks"][1:], strict=False):
        children = [node for node in tree.nodes if node.parent in level]
        alive = sorted((one for one in children if one.kind == "open"), key=lambda one: -one.score)
        found = sum(
            node.kind == "answer" and node.tag.count(".") <= level[0].count(".") + 1
            for node in tree.nodes
        )
        assert [by_tag[tag] for tag in following] == alive[: 3 - found]
    answers = [node for node in tree.nodes if node.kind == "answer"]
    assert tree.stopped == "decided" and len(answers) == 3
    assert by_tag[tree.chosen].q_value == max(node.q_value for node in answers)
    with pytest.raises(ValueError, match="beam search needs"):
        asyncio.run(beam_search(problem(), "", width=0, settings=settings, **policy))


def test_chains_are_independent_and_unfiltered():
    settings = SearchSettings(max_depth=8)
    policy = {"generate": latent(2), "append": append, "encode": encode, "run_code": fake_run}
    tree = asyncio.run(
        sample_chains(problem(), "", count=6, settings=settings, grade=grader("3"), **policy)
    )
    children = [node.parent for node in tree.nodes[1:]]
    assert children.count("0") == 6
    assert all(children.count(tag) <= 1 for tag in children if tag != "0")
    leaves = [node for node in tree.nodes[1:] if node.tag not in children]
    assert len(leaves) == 6 and {node.kind for node in leaves} <= {"answer", "error"}
    assert [node.tag for node in tree.nodes[1:7]] == [f"0.{number}" for number in range(1, 7)]


def test_real_code_runs_behind_its_prefix():
    policy = {
        "": [["<code>\n#@A\nx = 2\nprint('two')\n", "<end_of_step>"]],
        "A": [["\n#@B\nprint(x + 1)\n", "<end_of_code>"]],
        "A/B": [answer("C", 3)],
    }
    tree = searched(policy, SearchSettings(), run_code=run_code)
    assert tree.nodes[2].text.endswith("<end_of_code>\n<output>two\n3<end_of_output>")
    assert [node.output for node in tree.nodes] == ["", "two\n", "3\n", ""]
    written = encode("\n#@B\nprint(x + 1)\n<end_of_code>")
    assert (
        tree.nodes[2].written == len(written) and tree.nodes[2].token_ids[: len(written)] == written
    )
    assert "".join(map(chr, tree.nodes[2].token_ids)) == tree.nodes[2].text


def changing_policy(first, later):
    """A policy that draws `later` where it is asked a second time."""
    asked = collections.Counter()

    async def generate(handle, n, keys):
        name = "/".join(labels(handle))
        asked[name] += 1
        table = later if asked[name] > 1 and name in later else first
        return [candidate(text, mark) for text, mark in table[name]]

    return generate


NARROW = {
    "": [step("A", "x = 2")],
    "A": [step("F", "print(x)", ENDINGS[1])],
    "A/F": [answer("W", 2)],
    "B": [step("G", "print(x)", ENDINGS[1])],
    "B/G": [answer("R", 3)],
}


def test_a_used_up_tree_draws_new_steps_where_it_is_told_to():
    later = {"": [step("A", "x = 2"), step("B", "x = 3")], "A": NARROW["A"]}
    ended = searched(changing_policy(NARROW, later), SearchSettings(rollouts=8, candidates=2))
    assert ended.stopped == "exhausted" and ended.rollouts == 1
    settings = SearchSettings(rollouts=8, candidates=2, widen=True)
    found = searched(changing_policy(NARROW, later), settings)
    assert found.stopped == "rollouts" and found.rollouts == 8
    assert [node.verdict for node in found.nodes if node.kind == "answer"] == ["wrong", "correct"]
    assert [node.tag for node in found.nodes if node.parent == "0"] == ["0.1", "0.2"]
    # The one rollout that went below the new step was none of those that found nothing new
    assert found.wasted == 6 and found.nodes[0].visit_count == 2
    went_on = searched(
        changing_policy(
            later | {"A/F": NARROW["A/F"], "B": NARROW["B"], "B/G": NARROW["B/G"]}, later
        ),
        settings,
        tree=ended,
    )
    answers = [node.verdict for node in went_on.nodes if node.kind == "answer"]
    assert answers == ["wrong", "correct"] and went_on.rollouts == 8


def test_widening_draws_by_keys_of_its_own_and_goes_on_as_if_never_stopped():
    asked = []

    async def generate(handle, n, keys):
        asked.append(keys.tobytes())
        place = int(keys[0, 0]) % 7
        depth = len(labels(handle))
        if depth < 2:
            return [candidate(*step(f"S{(place + k) % 7}", f"x = {k}")) for k in range(n)]
        if depth == 2:
            return [candidate(*step("P", "print(x)", ENDINGS[1]))]
        return [candidate(*answer("W", 9))]

    settings = SearchSettings(rollouts=40, candidates=2, widen=True)
    whole = searched(generate, settings)
    assert len(set(asked)) == len(asked)
    half = searched(generate, dataclasses.replace(settings, rollouts=15))
    again = searched(generate, settings, tree=half)
    assert [(n.tag, n.text, n.visit_count) for n in again.nodes] == [
        (n.tag, n.text, n.visit_count) for n in whole.nodes
    ]
    assert (again.rollouts, again.wasted, again.tokens) == (
        whole.rollouts,
        whole.wasted,
        whole.tokens,
    )
    assert len([node for node in whole.nodes if node.parent == "0"]) > 2
