"""Preference models: batches that hold whole pairs, and training on toys whose right ranking is known."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from smallmath_jax.records import PreferencePair, Problem, Prompt
from smallmath_jax.search.select import ValueExample
from smallmath_jax.search.vote import scale_of
from smallmath_jax.tasks import judged, ppm
from smallmath_jax.tasks.judged import Judged, held_out, plan_steps
from smallmath_jax.tasks.policy import copied, load_policy, make_mesh
from smallmath_jax.train.loop import StopSignal

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from configs import ppm as ppm_config  # noqa: E402


def sequence(length):
    ids = np.arange(length, dtype=np.int32)
    prompt = Prompt("p", "", ids[:3], np.tile(ids[:3], (3, 1)), 3)
    return judged._ended(prompt, ids[3:].tolist())


def items(count, sides=2, seed=0):
    source = np.random.default_rng(seed)
    problem = lambda index: Problem(id=f"p{index // 3}", problem="", answer="")
    lengths = source.integers(5, 30, (count, sides))
    return [
        Judged(problem(index), tuple(map(sequence, row)), 1 / (1 + index % 4), float(index % 2))
        for index, row in enumerate(lengths)
    ]


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
            assert {(i, 0) for i, _ in held} == {(i, s) for i, s in held if s == 0}
            assert {i for i, s in held if s == 0} == {i for i, s in held if s == 1}
            for row in part:
                assert sum(len(found[i].sequences[s].token_ids) for i, s in row) <= 40
        assert tokens == sum(found[i].tokens for part in step for row in part for i, s in row if s)
    assert plan_steps(found, settings(epochs=2), 0, 0) == plan
    assert plan_steps(found, settings(epochs=2), 1, 0) != plan


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
    with StopSignal() as signal:
        return ppm.train_judge(
            copied(policy), problems, pairs, examples, config, folder, mesh, stop or signal
        )


@pytest.mark.parametrize("loss", ["ppm", pytest.param("pqm", marks=pytest.mark.full),
                                  pytest.param("orm", marks=pytest.mark.full)])  # fmt: skip
def test_the_known_ranking_is_learnt_and_restored(policy, tmp_path, loss):
    model, mesh = policy
    config = toy_config(loss, 40)
    found = trained(model, mesh, config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["held_out_pairs"] > 15 and result["held_out_accuracy"] > 0.9
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
