"""Preference models: batches that hold whole pairs, and training on toys whose right ranking is known."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from smallmath_jax.records import Node, PreferencePair, Problem, Prompt, Tree, write_part
from smallmath_jax.search.select import ValueExample
from smallmath_jax.search.vote import scale_of
from smallmath_jax.tasks import judged, ppm, training
from smallmath_jax.tasks.judged import Batches, held_out, judged_items, plan_steps
from smallmath_jax.tasks.policy import copied, load_policy, make_mesh
from smallmath_jax.train import step as steps
from smallmath_jax.train.loop import StopSignal

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from configs import ppm as ppm_config  # noqa: E402


def prompt_of(length=3):
    ids = np.arange(length, dtype=np.int32)
    return Prompt("p", "", ids, np.tile(ids, (3, 1)), length)


def items(count, seed=0):
    """Items of one pair whose sides share nothing, three a problem."""
    source = np.random.default_rng(seed)
    problem = lambda index: Problem(id=f"p{index // 3}", problem="", answer="")
    made = []
    for index in range(count):
        sides = [(side, *range(length)) for side, length in enumerate(source.integers(2, 27, 2))]
        term = (*sides, 1 / (1 + index % 4))
        made.append(judged.judged(problem(index), prompt_of(), [term]))
    return made


def settings(**changes):
    chosen = ppm_config.ppm_settings("tiny")
    chosen.update({"pairs": 8, "row_length": 40, "microbatch_rows": 3} | changes)
    return chosen


def test_a_plan_takes_every_pair_once_an_epoch_and_keeps_its_sides_together():
    found = items(24)
    plan = plan_steps(found, settings(epochs=2), 0, 0)
    assert len(plan.steps) == 6 and plan.microbatches == max(map(len, plan.steps))
    for epoch in (plan.steps[:3], plan.steps[3:]):
        entries = [e for step in epoch for part in step for row in part for e in row]
        assert sorted(entries) == [(index, side) for index in range(24) for side in (0, 1)]
    for step, tokens in zip(plan.steps, plan.tokens, strict=True):
        for part in step:
            assert len(part) == 3
            held = [e for row in part for e in row]
            assert {i for i, s in held if s == 0} == {i for i, s in held if s == 1}
            for row in part:
                assert sum(len(found[i].sequences[s].token_ids) for i, s in row) <= 40
        assert tokens == sum(found[i].tokens for part in step for row in part for i, s in row if s)
    assert plan_steps(found, settings(epochs=2), 0, 0) == plan
    assert plan_steps(found, settings(epochs=2), 1, 0) != plan


def pair(problem, prefix, chosen, rejected, positives=1, negatives=1):
    return PreferencePair(problem, prefix, chosen, rejected, positives, negatives, 1.0, "step")


def test_sides_that_begin_others_are_read_on_their_paths():
    a, b, c = [1], [1, 2], [1, 2, 3]
    terms = [((*a,), (9,), 0.5), ((*b,), (1, 7), 1.0), ((*c,), (9, 8), 1.0)]
    one = judged.judged(Problem(id="p", problem="", answer=""), prompt_of(), terms)
    paths = [tuple(sequence.token_ids[3:].tolist()) for sequence in one.sequences]
    assert sorted(paths) == [(1, 2, 3), (1, 7), (9, 8)] and one.tokens == 6 + 5 + 5
    read = [tuple(one.sequences[s].token_ids[3 : place + 1].tolist()) for s, place in one.ends]
    assert sorted(read) == [(1,), (1, 2), (1, 2, 3), (1, 7), (9,), (9, 8)]
    assert [(read[x], read[y], w) for x, y, w in one.pairs] == [tuple(term) for term in terms]
    assert one.terms == 3 and one.weight == 2.5


def test_items_hold_a_problem_and_drop_what_cannot_be_read(policy):
    model, _ = policy
    config = toy_config("ppm", 1)
    config.ppm.update({"max_tokens": 40})
    problems = [Problem(id=f"q{n}", problem="Larger?", answer="") for n in range(2)]
    found = [pair("q0", [5], [6], [7], 2, 2), pair("q0", [5, 6], [8], [9], 1, 2)]
    found += [pair("q1", [], [6], [7] * 50), pair("unknown", [], [6], [7])]
    examples = [ValueExample("q1", [6, 7], 0.5), ValueExample("q1", [6], -1.0)]
    both, single, dropped = judged_items(model, problems, found, examples, config)
    assert dropped == {"too_long": 1, "no_prompt": 1}
    (one,), (other,) = both, single
    assert one.problem.id == "q0" and [w for _, _, w in one.pairs] == [0.25, 0.5]
    assert len(other.sequences) == 1 and sorted(v for _, v in other.targets) == [-1.0, 0.5]
    config.ppm.microbatch_rows = 1  # an item takes half of its microbatch: 32 tokens here
    both, _, _ = judged_items(model, problems, found, [], config)
    assert len(both) == 2


def test_values_on_shared_paths_are_those_of_sides_read_apart(policy):
    model, mesh = policy
    config = toy_config("ppm", 1)
    problems = [Problem(id=f"q{n}", problem="Larger?", answer="") for n in range(4)]
    found = []
    for n in range(4):
        found += [pair(f"q{n}", [], [20 + n], [30 + n]), pair(f"q{n}", [20 + n], [40], [41, n])]
    whole, _, _ = judged_items(model, problems, found, [], config)
    apart = [one for term in found for one in judged_items(model, problems, [term], [], config)[0]]
    assert sum(one.tokens for one in whole) < sum(one.tokens for one in apart)
    headed = dataclasses.replace(model, model=ppm._with_head(copied(model), config, mesh))

    def margins(some):
        plan = plan_steps(some, settings(pairs=99, row_length=64), 0, 64)
        layout = training.Layout(64, 64, 3, plan.microbatches)
        batch = Batches(some, plan, layout, headed, mesh, 0).step(0, dropout=False)
        compute = training.make_compute(model.config, config, mesh)
        found = []
        for number in range(plan.microbatches):
            part = jax.tree.map(lambda x, n=number: x[n], batch)
            values = steps.end_values(headed.model, part, compute)
            margin = values[part["pairs"][:, 0]] - values[part["pairs"][:, 1]]
            found += np.asarray(margin)[np.asarray(part["pair_weights"]) > 0].tolist()
        assert np.isclose(np.sum(batch["pair_weights"]), 1, atol=1e-6)
        return sorted(found)

    np.testing.assert_allclose(margins(whole), margins(apart), atol=1e-5)


def test_an_item_holds_no_more_pictures_than_half_a_microbatch():
    """Every path brings the picture: tokens alone would let an item grow past the rows that have room for it."""
    seen = dataclasses.replace(prompt_of(), grids=np.array([[1, 4, 4]], np.int32))
    terms = [((n, 1), (n, 2), 1.0) for n in range(6)]
    chosen = settings(row_length=256, row_patches=16, microbatch_rows=4)  # a picture a row
    problem = Problem(id="p", problem="", answer="")
    found = [judged.judged(problem, seen, part) for part in judged._parts(terms, seen, chosen)]
    assert [len(one.sequences) for one in found] == [2] * 6
    assert len(plan_steps(found, chosen, 0, 16).steps[0]) == 3  # four pictures a microbatch
    blind = dataclasses.replace(seen, grids=np.zeros((0, 3), np.int32))
    assert len(list(judged._parts(terms, blind, chosen))) == 1


def test_no_step_of_an_epoch_is_empty():
    for sizes, parts in (([1] * 7, 7), ([50, 1, 1, 1], 4), ([1, 1, 50, 1, 1], 3), ([3] * 10, 4)):
        found = judged._part_of(np.array(sizes), parts).tolist()
        assert found == sorted(found) and set(found) == set(range(parts))


def test_a_budget_of_tokens_ends_a_plan():
    found = items(24)
    whole = plan_steps(found, settings(epochs=5), 0, 0)
    budget = sum(whole.tokens[:7]) - 1
    short = plan_steps(found, settings(epochs=5, tokens=budget), 0, 0)
    assert short.steps == whole.steps[:7]


def test_no_items_and_items_too_large_are_named():
    with pytest.raises(ValueError, match="no pair or example"):
        plan_steps([], settings(), 0, 0)
    with pytest.raises(ValueError, match="do not fit"):
        plan_steps(items(4), settings(row_length=10), 0, 0)


def test_problems_are_held_out_whole():
    train, test = held_out(items(300), 0.3, 0)
    names = lambda some: {item.problem.id for item in some}
    assert not names(train) & names(test)
    assert 0.2 < len(test) / 300 < 0.4


@pytest.mark.parametrize(
    "loss, tanh, squash", [("ppm", False, 5.0), ("ppm", True, 1.0), ("orm", False, 2.0)]
)
def test_a_log_weight_is_the_log_odds_of_the_loss(loss, tanh, squash):
    """Of what two raw values say of their items in training: PPM -log sigmoid(difference), ORM a logistic loss."""
    scale = scale_of(loss, tanh)
    assert scale.squash == squash
    for raw in (-2.0, 0.3, 4.0):
        value = np.tanh(raw) if tanh else raw  # losses.ppm(tanh=True) compares squashed values
        assert scale.log_weight(np.tanh(raw / squash)) == pytest.approx(value, rel=1e-6)


def test_a_pqm_weighs_by_the_chance_of_a_right_answer():
    scale = scale_of("pqm")
    assert scale.squash == 1.0  # losses.pqm fits tanh(value) to a mean of outcomes +1 and -1
    for right, wrong in ((3, 1), (1, 7), (5, 0)):
        score = (right - wrong) / (right + wrong)
        assert np.exp(scale.log_weight(score)) == pytest.approx(right / (right + wrong))
    assert np.isfinite(scale.log_weight(-1.0))


# ---- training on a toy: of two numbers the larger is right


def toy_config(loss, steps):
    config = ppm_config.get_config("tiny")
    config.ppm.update({"loss": loss, "steps": steps, "pairs": 32, "row_length": 64})
    config.ppm.update({"held_out": 0.2, "eval_every": 0, "dropout": 0.1})
    config.ppm.optimizer.update({"learning_rate": 3e-3, "schedule": "constant"})
    config.checkpoint.every = 10
    return config


@pytest.fixture(scope="module")
def policy():
    config = toy_config("ppm", 1)
    mesh = make_mesh(config)
    return load_policy(config, mesh), mesh


def toy(policy, count=160):
    encode = lambda value: policy.tokens.tokenizer.encode(f"a={value}", add_special_tokens=False)
    problems = [Problem(id=f"q{n}", problem="Larger?", answer="") for n in range(count)]
    source = np.random.default_rng(0)
    pairs, examples = [], []
    for one in problems:
        low, high = sorted(source.choice(20, 2, replace=False))
        pairs.append(PreferencePair(one.id, [], encode(high), encode(low), 1, 1, 1.0, "step"))
        examples += [
            ValueExample(one.id, encode(high), high / 20),
            ValueExample(one.id, encode(low), low / 20),
        ]
    return problems, pairs, examples


def trained(policy, mesh, config, folder, stop=None):
    problems, pairs, examples = toy(policy)
    if config.ppm.loss == "orm":
        examples = [dataclasses.replace(one, value=float(one.value > 0.5)) for one in examples]
        sides = zip(pairs, examples[::2], examples[1::2], strict=True)  # it ranks right over wrong
        pairs = [pair_ for pair_, high, low in sides if high.value > low.value]
    with StopSignal() as signal:
        return ppm.train_judge(
            copied(policy), problems, pairs, examples, config, folder, mesh, stop or signal
        )


def test_items_carry_the_pairs_factor_and_what_is_dropped_is_counted(policy):
    """Equation 4's 1 / (n_pos n_neg); a side that is too long drops its term whole, with the prompt counted."""
    model, _ = policy
    config = toy_config("ppm", 1)
    problems = [Problem(id="q", problem="Larger?", answer="")]
    pairs = [
        pair("q", [5, 6], [7], [8, 9], 2, 3),
        pair("q", [5, 6], [7], [8]),
        pair("gone", [], [7], [8]),
    ]
    examples = [ValueExample("q", [5, 7], 0.25), ValueExample("gone", [5], 1.0)]
    (both,), (single,), dropped = judged_items(model, problems, pairs, examples, config)
    assert [weight for _, _, weight in both.pairs] == pytest.approx([1 / 6, 1.0])
    assert both.weight == pytest.approx(7 / 6) and dropped == {"no_prompt": 2}
    assert single.targets == ((0, 0.25),)
    prompt = single.sequences[0].token_ids.tolist()[:-2]
    paths = [one.token_ids.tolist() for one in both.sequences]
    assert sorted(paths) == [[*prompt, *ids] for ids in ([5, 6, 7], [5, 6, 8, 9])]
    for one in both.sequences:
        assert one.weights.tolist() == [0.0] * (len(one.token_ids) - 1) + [1.0]
    longest = len(prompt) + 4
    for limit, kept in ((longest, 2), (longest - 1, 1), (longest - 2, 0)):
        config.ppm.max_tokens = limit
        both, _, dropped = judged_items(model, problems, pairs[:2], [], config)
        assert (sum(one.terms for one in both), dropped.get("too_long", 0)) == (kept, 2 - kept)


@pytest.mark.parametrize("loss", ["ppm", pytest.param("pqm", marks=pytest.mark.full),
                                  pytest.param("orm", marks=pytest.mark.full)])  # fmt: skip
def test_the_known_ranking_is_learnt_and_restored(policy, tmp_path, loss):
    model, mesh = policy
    config = toy_config(loss, 40 if loss == "ppm" else 80)  # a pair tells more than two values
    found = trained(model, mesh, config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["held_out_pairs"] > 12 and result["held_out_accuracy"] > 0.9
    again = trained(model, mesh, config, tmp_path)
    for one, other in zip(jax.tree.leaves(found.model), jax.tree.leaves(again.model), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = (tmp_path / "metrics").glob("*.jsonl")
    assert any("eval/accuracy" in part.read_text() for part in rows)


class Leave:
    """A signal that comes in the third step."""

    exit_code = 143

    def __init__(self):
        self.asked = 0

    @property
    def requested(self):
        self.asked += 1
        return self.asked == 3


@pytest.mark.full
def test_killed_and_continued_it_ends_bit_identically(policy, tmp_path):
    model, mesh = policy
    config = toy_config("ppm", 6)
    whole = trained(model, mesh, config, tmp_path / "whole")
    with pytest.raises(SystemExit):
        trained(model, mesh, config, tmp_path / "cut", Leave())
    cut = trained(model, mesh, config, tmp_path / "cut")
    for one, other in zip(jax.tree.leaves(whole.model), jax.tree.leaves(cut.model), strict=True):
        np.testing.assert_array_equal(one, other)


# ---- the command


def searched_tree(number, verdicts=("correct", "wrong")):
    """A problem with two answers below its root, drawn as character ids."""
    nodes = [Node("0", "", [], 0, 0.0, "root", 2, 0.0)]
    for place, verdict in enumerate(verdicts, 1):
        ids = [20 + place, 30 + number % 9]
        value = 1.0 if verdict == "correct" else -1.0
        nodes.append(
            Node(f"0.{place}", f"{place}", ids, 2, -1.0, "answer", 1, value, answer=f"{place}",
                 verdict=verdict)
        )  # fmt: skip
    return Tree(f"t{number}", f"What is {number}?", "1", nodes)


@pytest.mark.parametrize("held_out_share", [0.3, 0.0])
def test_the_command_ends_with_a_report(tmp_path, capsys, held_out_share):
    write_part(tmp_path / "s" / "trees", "00000-host0.jsonl", map(searched_tree, range(30)))
    config = ppm_config.get_config("tiny")
    config.trees = (str(tmp_path / "s" / "trees"),)
    config.ppm.update({"steps": 2, "pairs": 16, "held_out": held_out_share})
    ppm.run(config, str(tmp_path / "run"))
    assert "held out nan" not in capsys.readouterr().err
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    record = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["reward_model"]
    assert "pairs held out" in page and "nan" not in page.lower().replace("finance", "")
    assert (record["held_out_accuracy"] is None) == (record["held_out_pairs"] == 0)
    assert (record["held_out_pairs"] > 3) == (held_out_share > 0)


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["s"], r"s: no tree there; there are some in .*s/trees"),
        (["e"], r"e: no tree there; there are some in .*e/round_1/search/trees"),
        (["s/trees", "nowhere"], "nowhere: no such folder"),
        (["v/trees"], "learn from those of configs/search.py"),
        ([], "config.trees is empty"),
    ],
)
def test_folders_without_trees_to_learn_from_are_told(tmp_path, folders, said):
    write_part(tmp_path / "s" / "trees", "0.jsonl", [searched_tree(1)])
    write_part(tmp_path / "e" / "round_1" / "search" / "trees", "0.jsonl", [searched_tree(1)])
    write_part(tmp_path / "v" / "trees", "0.jsonl", [searched_tree(1, ("", ""))])
    with pytest.raises(ValueError, match=said):
        ppm.graded_trees([str(tmp_path / name) for name in folders])
