"""GRPO's arithmetic around the update, with a trainer and an engine that only keep what they are given."""

import dataclasses
import itertools
import pathlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from smallmath_jax.data.tokens import load_tokens
from smallmath_jax.records import Problem, Prompt, draw_key
from smallmath_jax.rollout.engine import Rollout
from smallmath_jax.tasks import grpo, grpo_metrics
from smallmath_jax.train import losses
from smallmath_jax.verify import rewards
from smallmath_jax.verify.grader import Grader


def config_of(**changes):
    settings = dict(
        prompts=2,
        group_size=2,
        updates=1,
        inner_epochs=1,
        denominator="group",
        advantage_scale="none",
        advantage_eps=0.0,
        kl_beta=0.0,
        sampling=dict(max_tokens=9, temperature=0.7, top_p=1.0, top_k=0),
    )
    return ConfigDict({"seed": 0, "grpo": settings | changes})


def prompt(name, length=3, following=50):
    """A prompt whose next position is far from its length, as behind an image."""
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Prompt(name, "", ids, np.tile(ids, (3, 1)), following)


def row(place, sample, ids, reward, verdict="wrong", masked=False, gated=False, stop="eos"):
    return {
        "token_ids": ids,
        "logprobs": [-0.5] * len(ids),
        "rewards": {
            "total": reward,
            "format": 1.0,
            "length": 0.25,
            "correct": float(verdict == "correct"),
            "masked": float(masked),
        },
        "verdict": verdict,
        "stop_reason": stop,
        "sample": sample,
        "extra": {"place": place, "masked": masked, "gated": gated},
    }


ROWS = [
    row(0, 0, [7, 0, 9], 1.0, "correct"),  # token 0 is a token like any other
    row(0, 1, [7, 9], 0.0),
    row(1, 0, [4, 4, 4, 9], 1.0, "correct", gated=True),
    row(1, 1, [4], 1.0, "correct", gated=True),
    row(2, 0, [5, 6, 7, 8, 5, 6], 0.0, stop="length", masked=True),
    row(2, 1, [5, 9], 1.0, "correct"),
    row(3, 0, [5, 6, 9], 1.0, "correct"),
    row(3, 1, [5, 9], -1.0),
    row(3, 2, [5, 9], np.nan, "timeout", masked=True),
]
PROMPTS = [prompt(f"p{number}", 3 + number) for number in range(4)]


class Recorder:
    """A trainer that keeps what each update is given; its model is the number of updates so far."""

    def __init__(self):
        self.updates, self.scored = [], []

    def step(self, state, sequences):
        self.updates.append(sequences)
        return SimpleNamespace(model=state.model + 1), {"loss": 1.0, "clip_ratio/low_min": 2.0}

    def with_log_probs(self, sequences, model, field):
        self.scored.append((model, field, len(sequences)))
        values = lambda sequence: np.full(len(sequence.token_ids), model, np.float32)
        return [
            dataclasses.replace(one, fields={**one.fields, field: values(one)}) for one in sequences
        ]


def updated(config, rows=ROWS, reference=None, step=0):
    trainer = Recorder()
    batch = grpo.group_batch(PROMPTS, rows, config)
    state = SimpleNamespace(model=0)
    state, metrics = grpo.update(trainer, state, batch, config, step, reference)
    return trainer, metrics, state, batch


def test_ids_positions_and_the_end_token_travel_from_the_sampler_to_the_batch():
    batch = grpo.group_batch(PROMPTS, ROWS, config_of())
    for one, sequence, place in zip(ROWS, batch.sequences, batch.group_ids, strict=True):
        start, count = len(PROMPTS[place].token_ids), len(one["token_ids"])
        assert sequence.token_ids.tolist() == [*PROMPTS[place].token_ids, *one["token_ids"]]
        assert sequence.positions[:, start:].tolist() == [[*range(50, 50 + count)]] * 3
        assert sequence.weights.tolist() == [0] * start + [1] * count
        assert sequence.fields["sampler_log_probs"][start:].tolist() == [-0.5] * count
        np.testing.assert_allclose(sequence.fields["temperature"][start:], 0.7)
    assert batch.lengths.tolist() == [3, 2, 4, 1, 6, 2, 3, 2, 2]


def test_masked_samples_leave_the_mean_and_a_group_of_one_teaches_nothing():
    batch = grpo.group_batch(PROMPTS, ROWS, config_of())
    np.testing.assert_array_equal(batch.advantages, [0.5, -0.5, 0, 0, 0, 0, 1, -1, 0])
    assert batch.valid.tolist() == [True] * 4 + [False] + [True] * 3 + [False]


@pytest.mark.parametrize(
    ("denominator", "weights"),
    [  # of the tokens of groups 0 and 3; groups 1 and 2 teach nothing and count all the same
        ("group", [1 / 20, 1 / 20, 1 / 20, 1 / 20]),
        ("printed", [1 / 8, 1 / 8, 1 / 8, 1 / 8]),
        ("sequence", [1 / 24, 1 / 16, 1 / 24, 1 / 16]),
        ("batch", [1 / 17, 1 / 17, 1 / 17, 1 / 17]),
        ("constant", [1 / 63, 1 / 63, 1 / 63, 1 / 63]),
    ],
)
def test_what_is_not_forwarded_stays_in_the_denominators(denominator, weights):
    trainer, _, _, _ = updated(config_of(denominator=denominator))
    (sequences,) = trainer.updates
    assert [float(one.fields["advantages"][-1]) for one in sequences] == [0.5, -0.5, 1, -1]
    for sequence, weight in zip(sequences, weights, strict=True):
        scored = sequence.weights[sequence.fields["advantages"] != 0]
        np.testing.assert_allclose(scored, weight, rtol=1e-6)


def test_pi_old_is_the_trainers_own_before_the_first_of_several_updates():
    assert updated(config_of())[0].scored == []  # one update: the current pass is pi_old
    for more in (dict(updates=2), dict(inner_epochs=2)):
        trainer, _, state, _ = updated(config_of(**more))
        assert trainer.scored == [(0, "old_log_probs", 4)]
        assert state.model == len(trainer.updates) > 0
        for sequences in trainer.updates:
            assert all((one.fields["old_log_probs"] == 0).all() for one in sequences)


def test_every_epoch_gives_each_group_to_one_update_whole():
    config = config_of(updates=2, inner_epochs=3)
    trainer, metrics, _, _ = updated(config)
    assert len(trainer.updates) <= 6 and metrics == {"loss": 1.0, "clip_ratio/low_min": 2.0}
    lengths = [sorted(len(one.token_ids) for one in part) for part in trainer.updates]
    assert sorted(sum(lengths, [])) == sorted([6, 5, 9, 8] * 3)
    assert all(part in ([5, 6], [8, 9], [5, 6, 8, 9]) for part in lengths)  # whole groups


def test_with_a_reference_all_valid_completions_are_forwarded():
    trainer, _, _, batch = updated(config_of(kl_beta=0.1), reference=7)
    assert trainer.scored == [(7, "reference_log_probs", 7)] and batch.valid.sum() == 7
    assert len(trainer.updates[0]) == 7


def test_a_batch_that_teaches_nothing_changes_nothing():
    rows = [row(0, 0, [7], 1.0), row(0, 1, [8], 1.0), row(1, 0, [7], 0.0, masked=True)]
    trainer, metrics, state, _ = updated(config_of(updates=2), rows)
    assert trainer.updates == [] and metrics == {} and state.model == 0


def test_a_steps_metrics_by_hand():
    batch = grpo.group_batch(PROMPTS, ROWS, config_of())
    record = grpo_metrics.step_metrics(
        batch, {"loss": 0.5}, {"generate": 2.0, "train": 3.0}, {"recompilations": 1}
    )
    assert record["groups/gated"] == 1 / 4  # the group of place 1
    assert record["groups/all_correct"] == 2 / 4 and record["groups/mixed"] == 2 / 4
    assert record["frac_reward_zero_std"] == 2 / 4
    assert record["accuracy"] == 5 / 9 and record["reward"] == pytest.approx(4 / 7)
    assert record["completions/masked_ratio"] == 2 / 9
    assert record["completions/clipped_ratio"] == 1 / 9
    assert record["verifier/timeout_frac"] == 1 / 9
    assert record["adv/token_weighted_mean"] == pytest.approx((1.5 - 1 + 3 - 2) / 17)
    assert record["num_tokens"] == 25 and record["step_time"] == 5.0
    assert record["recompile/count"] == 1 and record["loss"] == 0.5
    assert "rewards/masked/mean" not in record and record["rewards/format/mean"] == 1.0


def test_each_epoch_asks_every_problem_once():
    asked = [index for step in range(10) for index in grpo.step_problems(20, step, 4, seed=3)]
    assert sorted(asked[:20]) == sorted(asked[20:]) == list(range(20))
    assert asked[:20] != asked[20:]


def test_no_step_asks_a_problem_twice_and_all_have_their_turn():
    for count, per_step in ((10, 4), (7, 4), (4, 4), (9, 2)):
        steps = [grpo.step_problems(count, step, per_step, seed=3) for step in range(40)]
        assert all(len(set(asked)) == per_step for asked in steps)
        whole = count // per_step  # steps an epoch
        assert all(
            len(set(sum(steps[first : first + whole], []))) == whole * per_step
            for first in range(0, 40 - whole, whole)
        )
        assert set(sum(steps, [])) == set(range(count))
        assert steps[17] == grpo.step_problems(count, 17, per_step, seed=3)  # as on resume


class LateEngine:
    """An engine whose rollouts say which key drew them, the last submitted finished first."""

    slots = 64

    def __init__(self):
        self.tickets, self.prompts = {}, []

    def root(self, prompt):
        self.prompts.append(prompt.problem_id)
        return len(self.prompts) - 1

    def submit(self, node, n, limits, sampling, keys):
        first = len(self.tickets)
        self.tickets |= {first + i: keys[i] for i in range(n)}
        return list(range(first, first + n))

    def step(self):
        done = sorted(self.tickets.items(), reverse=True)
        self.tickets = {}
        return [(t, Rollout(key.view(np.int32), np.zeros(2), "eos", 0)) for t, key in done]

    def prune(self, node):
        pass


def test_draws_are_named_by_problem_step_and_sample_whatever_finishes_first():
    def draws(names, step):
        groups = grpo.sample_groups(LateEngine(), [prompt(n) for n in names], config_of(), step)
        return {
            name: [tuple(rollout.token_ids.view(np.uint32)) for rollout in group]
            for name, group in zip(names, groups, strict=True)
        }

    first = draws(["a", "b", "c"], step=4)
    assert draws(["c", "a"], step=4) == {name: first[name] for name in ("c", "a")}
    for name in first:
        assert first[name] == [tuple(draw_key(0, "grpo", name, 4, sample)) for sample in range(2)]
    later = draws(["a", "b", "c"], step=5)
    assert len({key for group in [*first.values(), *later.values()] for key in group}) == 12


def test_a_group_is_graded_by_any_accepted_answer_and_says_what_was_gated():
    tokens = load_tokens("tiny")
    problem = Problem("q", "x^2 = 9", "3", meta={"accepted": ["3", "-3"]})
    texts = [
        "<think>a b c</think><answer>-3</answer>",
        "<think>a</think><answer>3</answer>",
        "<answer>3</answer>",
    ]
    ids = [tokens.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    end = tokens.im_end
    group = [
        Rollout(np.array([*one, end]), np.zeros(len(one) + 1), reason, 4)
        for one, reason in zip(ids, ("eos", "eos", "length"), strict=True)
    ]
    policy = SimpleNamespace(tokens=tokens)
    with Grader() as grader:
        graded = {
            settings: grpo.grade_group(5, problem, prompt("q"), group, policy, settings, grader, 6)
            for settings in (rewards.RewardSettings("safe"), rewards.RewardSettings("paper"))
        }
    for settings, rows in graded.items():
        gated = settings.preset == "safe"
        assert [one.verdict for one in rows] == ["correct"] * 3
        assert [one.extra["masked"] for one in rows] == [False, False, True]
        assert [one.extra["gated"] for one in rows] == [gated] * 3
        assert [one.token_ids for one in rows] == [rollout.token_ids.tolist() for rollout in group]
        assert (rows[0].rewards["total"] == rows[1].rewards["total"]) == gated
        assert rows[0].extra["accepted"] == ("3", "-3") and rows[0].step == 7


def test_literal_pays_a_broken_text_by_its_own_length():
    tokens = load_tokens("tiny")
    ids = tokens.tokenizer.encode("2 + 1 is 3, so 3", add_special_tokens=False)
    rollout = Rollout(np.array([*ids, tokens.im_end]), np.zeros(len(ids) + 1), "eos", 4)
    settings = rewards.RewardSettings("literal", target=2 * len(ids))
    problem, policy = Problem("q", "2 + 1?", "3"), SimpleNamespace(tokens=tokens)
    with Grader() as grader:
        (row,) = grpo.grade_group(0, problem, prompt("q"), [rollout], policy, settings, grader, 0)
    paid = rewards.reward(rewards.Parsed(False), len(ids), row.verdict, "eos", settings)
    assert row.rewards["length"] == pytest.approx(0.25) and row.rewards == paid.as_dict()


@pytest.mark.parametrize("change", [{"top_p": 0.95}, {"top_k": 50}, {"temperature": 0.0}])
def test_sampling_that_the_trainer_could_not_score_is_refused(change, tmp_path):
    config = config_of()
    config.grpo.sampling.update(change)
    with pytest.raises(ValueError, match="grpo.sampling: .*leave top_p at 1"):
        grpo.load_grpo_problems(config, tmp_path)


def documented():
    """Names in the table of docs/metrics.md, {a,b} spelt out; those that end in "…" stand for a prefix."""
    page = pathlib.Path(__file__).parents[1] / "docs" / "metrics.md"
    names = set()
    for line in page.read_text().splitlines():
        family = ""
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            name = family + name if name.startswith("/") else name  # "`a/mean`, `/std`"
            family = name.rpartition("/")[0]
            parts = [part.strip("{}").split(",") for part in re.findall(r"\{.*?\}|[^{}]+", name)]
            names |= {"".join(chosen) for chosen in itertools.product(*parts)}
    return names


def test_every_metric_of_a_step_is_documented_and_every_documented_one_is_there():
    field = np.full((1, 2), 0.5, np.float32)
    scores = losses.TokenScores(field, field, field > 0)
    fields = ("weights", "advantages", "sampler_log_probs", "reference_log_probs")
    _, found = losses.grpo(scores, dict.fromkeys(fields, field), kl_beta=0.1)
    update = dict.fromkeys((*found, "loss", "grad_norm", "param_norm", "learning_rate"), 0.0)
    batch = grpo.group_batch(PROMPTS, ROWS, config_of())
    seconds = dict.fromkeys(("generate", "grade", "train"), 1.0)
    record = grpo_metrics.step_metrics(batch, update, seconds, {"recompilations": 0})
    told = documented()
    assert {name for name in record if not name.startswith("engine/")} - told == set()
    assert told - set(record) == {"engine/…", "mean_token_accuracy"}  # the second is SFT's
