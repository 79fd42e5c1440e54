"""Advantages and token weights: the numbers of the papers, and the edges where other systems go wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from smallmath_jax.train import advantages as adv


def test_group_std_is_torch_std():
    rewards = np.array([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(
        adv.advantages(rewards, np.zeros(4), eps=0.0), [1.5, -0.5, -0.5, -0.5]
    )
    reward = torch.tensor(rewards)
    expected = (reward - reward.mean()) / (reward.std() + 1e-4)
    np.testing.assert_allclose(adv.advantages(rewards, np.zeros(4)), expected)
    population = adv.advantages(rewards, np.zeros(4), ddof=0, eps=0.0)
    assert population[0] / 1.5 == pytest.approx(1.1547, abs=1e-4)


def test_scales():
    rewards, groups = np.array([1.0, 0.0, 3.0, 1.0]), np.array([7, 7, 2, 2])
    np.testing.assert_allclose(adv.advantages(rewards, groups, scale="none"), [0.5, -0.5, 1, -1])
    batch = adv.advantages(rewards, groups, scale="batch_std", eps=0.0)
    np.testing.assert_allclose(batch, np.array([0.5, -0.5, 1, -1]) / rewards.std(ddof=1))
    with pytest.raises(ValueError, match="group_std, batch_std, none"):
        adv.advantages(rewards, groups, scale="std")


def test_an_order_of_completions_changes_no_advantage():
    rng = np.random.default_rng(0)
    rewards, groups = rng.normal(size=40), np.repeat(np.arange(5), 8)
    valid = rng.random(40) < 0.8
    order = rng.permutation(40)
    straight = adv.advantages(rewards, groups, valid)
    shuffled = adv.advantages(rewards[order], groups[order], valid[order])
    np.testing.assert_allclose(shuffled, straight[order], atol=1e-12)
    assert (straight[~valid] == 0).all()
    for group in range(5):
        assert straight[groups == group].sum() == pytest.approx(0, abs=1e-9)


def test_groups_that_cannot_teach_give_exactly_zero():
    # Seven float32 rewards of 0.95 have a std of 6e-8: max == min decides, not the std.
    equal = np.full(7, np.float32(0.95))
    assert (adv.advantages(equal, np.zeros(7), eps=0.0) == 0).all()
    assert (adv.advantages([3.0], [0], eps=0.0) == 0).all()
    masked_to_one = adv.advantages([3.0, 1.0], [0, 0], [True, False], eps=0.0)
    assert (masked_to_one == 0).all()
    nothing = adv.advantages([np.nan, np.nan], [0, 0], [False, False], eps=0.0)
    assert (nothing == 0).all()
    assert adv.advantages([], []).shape == (0,)


def test_a_masked_member_leaves_the_mean():
    found = adv.advantages([1.0, 0.0, np.nan], [0, 0, 0], [True, True, False], scale="none")
    np.testing.assert_array_equal(found, [0.5, -0.5, 0.0])


LENGTHS, GROUPS = np.array([40, 60, 300, 600]), np.array([0, 0, 1, 1])  # 100 and 900 tokens


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [
        ("group", [1 / 200, 1 / 200, 1 / 1800, 1 / 1800]),
        ("printed", [1 / 4] * 4),
        ("sequence", [1 / 160, 1 / 240, 1 / 1200, 1 / 2400]),
        ("batch", [1 / 1000] * 4),
        ("constant", [1 / (4 * 2048)] * 4),
    ],
)
def test_denominators(denominator, expected):
    found = adv.token_weights(denominator, LENGTHS, GROUPS, max_length=2048)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("denominator", adv.DENOMINATORS)
def test_a_masked_completion_is_in_no_denominator(denominator):
    run = lambda *args: adv.token_weights(denominator, *args, max_length=64)
    masked = run([5, 7, 9, 11], [0, 0, 1, 1], [True, False, True, True])
    without = run([5, 9, 11], [0, 1, 1])
    np.testing.assert_allclose(masked[[0, 2, 3]], without)
    assert masked[1] == 0
    gone = run([5, 7, 9, 11], [0, 0, 1, 1], [False, False, True, True])
    np.testing.assert_allclose(gone[2:], run([9, 11], [1, 1]))
    assert (run([5, 7], [0, 0], [False, False]) == 0).all()


def test_weights_of_a_batch_sum_as_their_mean_says():
    rng = np.random.default_rng(0)
    lengths, groups = rng.integers(1, 90, 24), np.repeat(np.arange(6), 4)
    per_token = lambda name: (
        adv.token_weights(name, lengths, groups, max_length=90) * lengths
    ).sum()
    assert per_token("group") == pytest.approx(1)
    assert per_token("batch") == pytest.approx(1)
    assert per_token("sequence") == pytest.approx(1)
    assert per_token("printed") == pytest.approx(lengths.sum() / 24)
    assert per_token("constant") == pytest.approx(lengths.sum() / 24 / 90)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="known: group, printed"):
        adv.token_weights("token", [1], [0])
    with pytest.raises(ValueError, match="max_length"):
        adv.token_weights("constant", [1], [0])
    with pytest.raises(ValueError, match="equally long"):
        adv.advantages([1.0, 2.0], [0])


def test_pair_weights():
    np.testing.assert_allclose(adv.pair_weights([2, 1], [2, 4], problems=2), [1 / 8, 1 / 8])


def test_batch_metrics():
    rewards = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    groups = np.array([0, 0, 1, 1, 2, 2])
    lengths = np.array([10, 30, 20, 20, 64, 16])
    stops = ["eos", "eos", "stop", "eos", "length", "eos"]
    verdicts = ["correct", "wrong", "correct", "correct", "no_answer", "timeout"]
    values = adv.advantages(rewards, groups)
    found = adv.batch_metrics(rewards, values, groups, lengths, stops, verdicts)
    assert found["reward"] == 0.5 and found["accuracy"] == 0.5
    assert found["reward_std"] == pytest.approx(np.sqrt(0.5) / 3)
    assert found["frac_reward_zero_std"] == pytest.approx(2 / 3)
    for kind in ("all_correct", "all_wrong", "mixed"):
        assert found[f"groups/{kind}"] == pytest.approx(1 / 3)
    assert found["completions/mean_length"] == pytest.approx(lengths.mean())
    assert found["completions/max_length"] == 64
    assert found["completions/max_terminated_length"] == 30
    assert found["completions/clipped_ratio"] == pytest.approx(1 / 6)
    assert found["length/correct_mean"] == pytest.approx(50 / 3)
    assert found["length/wrong_mean"] == pytest.approx(110 / 3)
    weighted = (values * lengths).sum() / lengths.sum()
    assert found["adv/token_weighted_mean"] == pytest.approx(weighted) and weighted < 0
    assert found["verifier/timeout_frac"] == pytest.approx(1 / 6)
    assert found["groups/gated"] == 0
    json.dumps(found, allow_nan=False)
    # Three groups, of which the last has no valid completion and the first was gated.
    valid = np.array([1, 1, 1, 0, 0, 0], bool)
    gated = np.array([1, 1, 0, 0, 1, 1], bool)
    some = adv.batch_metrics(rewards, values, groups, lengths, stops, verdicts, valid, gated)
    assert some["groups/gated"] == 0.5 and some["groups/mixed"] == 0.5
    assert some["completions/masked_ratio"] == 0.5 and some["reward"] == pytest.approx(2 / 3)
    empty = adv.batch_metrics([], [], [], [], [], [])
    json.dumps(empty, allow_nan=False)


def test_no_device_is_needed():
    code = "import sys, smallmath_jax.train.advantages; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
