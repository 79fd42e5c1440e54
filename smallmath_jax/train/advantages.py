"""Advantages and token weights, computed once per generation batch on the host (laws 1, 7 and 9). NumPy only.

N completions, each with a group id (its prompt) in any order and with any gaps. `valid` is False for a completion
that must not count (truncated and masked, or not gradable): it leaves numerator, denominator and group mean alike.
"""

from typing import Any

import numpy as np

DENOMINATORS = ("group", "printed", "sequence", "batch", "constant")
SCALES = ("group_std", "batch_std", "none")


def advantages(
    rewards: Any,
    group_ids: Any,
    valid: Any = None,
    *,
    scale: str = "group_std",
    ddof: int = 1,
    eps: float = 1e-4,
) -> np.ndarray:
    """(reward - group mean) / (std + eps), float64 [N].

    Exactly 0 for an invalid completion, for a group with fewer than two valid ones, and for a group whose valid
    rewards are all equal: decided by max == min, because the std of equal floats need not be 0.

    Args:
        rewards: [N]; ignored where not valid (may be NaN there).
        group_ids: int [N].
        valid: bool [N]; None: all.
        scale: "group_std" (GRPO), "batch_std" (std of all valid rewards), "none" (Dr. GRPO: mean only).
        ddof: 1 as torch.std, which TRL and verl use (numpy and jax default to 0: 15 % apart at G = 4).
        eps: added to the std.
    """
    _known("advantage scale", scale, SCALES)
    rewards, group, valid = _aligned(rewards, group_ids, valid)
    size = _sums(valid, group)
    mean = _sums(rewards, group) / np.maximum(size, 1)
    centred = np.where(valid, rewards - mean[group], 0.0)
    if scale == "group_std":
        spread = np.sqrt(_sums(centred**2, group) / np.maximum(size - ddof, 1))[group] + eps
    elif scale == "batch_std":
        spread = (np.std(rewards[valid], ddof=ddof) if valid.sum() > ddof else 0.0) + eps
    else:
        spread = 1.0
    teaches = valid & ~constant_groups(rewards, group, valid)[group]
    return np.divide(centred, spread, out=np.zeros(len(rewards)), where=teaches)


def token_weights(
    denominator: str,
    lengths: Any,
    group_ids: Any,
    valid: Any = None,
    *,
    max_length: int | None = None,
) -> np.ndarray:
    """The weight of each token of each completion, float64 [N], so that the loss is -sum(w * objective).

    With q groups that have a valid completion, G valid ones in the group, |o| tokens in the completion:

        group     1 / (q * tokens of the group)     Adjusted GRPO of Small-Math-R1
        printed   1 / (q * G)                        the paper's print of GRPO, no 1 / |o|
        sequence  1 / (q * G * |o|)                  GRPO (DeepSeekMath)
        batch     1 / tokens of all groups           DAPO, "token mean"
        constant  1 / (completions * max_length)     Dr. GRPO

    Invalid completions weigh 0; when none is valid all weights are 0. Call it on the completions of one optimiser
    update: however they are then cut into microbatches, the gradient is the same.

    Args:
        lengths: int [N] completion tokens, the stop token included.
        max_length: the sampling limit; needed by "constant" only.
    """
    _known("denominator", denominator, DENOMINATORS)
    if denominator == "constant" and not max_length:
        raise ValueError("denominator 'constant' divides by max_length; give the sampling limit")
    lengths, group, valid = _aligned(lengths, group_ids, valid)
    size, tokens = _sums(valid, group), _sums(lengths, group)
    groups = (size > 0).sum()
    below = {
        "group": groups * tokens[group],
        "printed": groups * size[group],
        "sequence": groups * size[group] * lengths,
        "batch": np.full(len(lengths), tokens.sum()),
        "constant": np.full(len(lengths), valid.sum() * (max_length or 0), float),
    }[denominator]
    counts = valid & (lengths > 0)
    return np.divide(1.0, below, out=np.zeros(len(lengths)), where=counts)


def pair_weights(positives: Any, negatives: Any, problems: int = 1) -> np.ndarray:
    """The weight of each preference pair, float64 [N]: 1 / (n_pos * n_neg) of its step, over `problems`."""
    return 1.0 / (np.asarray(positives, float) * np.asarray(negatives, float) * problems)


def constant_groups(values: Any, group_ids: Any, valid: Any = None) -> np.ndarray:
    """bool, by sorted unique group id: all valid members have the same value (true with fewer than two)."""
    values, group, valid = _aligned(values, group_ids, valid)
    count = int(group.max(initial=-1)) + 1
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, group[valid], values[valid])
    np.maximum.at(high, group[valid], values[valid])
    return low >= high


def batch_metrics(
    rewards: Any,
    values: Any,
    group_ids: Any,
    lengths: Any,
    stop_reasons: Any,
    verdicts: Any,
    valid: Any = None,
    gated: Any = None,
) -> dict[str, float]:
    """The generation batch in numbers, named as in TRL where TRL has the metric.

    `values` are the advantages. Reward metrics are over valid completions; lengths and verdicts over all; groups are
    those with a valid completion. gated: bool [N], the length terms of the completion's group were replaced.
    `adv/token_weighted_mean` is 0 only where length and advantage are uncorrelated: its sign is the length bias.
    """
    lengths_all = np.asarray(lengths, float)
    verdicts, stopped = np.asarray(verdicts), np.asarray(stop_reasons) != "length"
    correct = verdicts == "correct"
    rewards, group, valid = _aligned(rewards, group_ids, valid)
    size, tokens = _sums(valid, group), np.where(valid, lengths_all, 0)
    mean = _sums(rewards, group) / np.maximum(size, 1)
    squares = _sums(np.where(valid, (rewards - mean[group]) ** 2, 0), group)
    spread = np.sqrt(squares / np.maximum(size - 1, 1))
    alive = size > 0
    right = _sums(correct & valid, group)
    weighted = float((np.asarray(values) * tokens).sum() / max(tokens.sum(), 1))
    return {
        "reward": _average(rewards[valid]),
        "reward_std": _average(spread[alive]),
        "frac_reward_zero_std": _average(constant_groups(rewards, group, valid)[alive]),
        "accuracy": _average(correct),
        "completions/mean_length": _average(lengths_all),
        "completions/min_length": float(lengths_all.min(initial=np.inf))
        if len(lengths_all)
        else 0.0,
        "completions/max_length": float(lengths_all.max(initial=0)),
        **_terminated(lengths_all[stopped]),
        "completions/clipped_ratio": _average(~stopped),
        "completions/masked_ratio": _average(~valid),
        "length/correct_mean": _average(lengths_all[correct]),
        "length/wrong_mean": _average(lengths_all[~correct]),
        "groups/all_correct": _average((right == size)[alive]),
        "groups/all_wrong": _average((right == 0)[alive]),
        "groups/mixed": _average(((right > 0) & (right < size))[alive]),
        "groups/gated": _average(
            _sums(np.zeros(len(group)) if gated is None else gated, group)[alive] > 0
        ),
        "adv/token_weighted_mean": weighted,
        "verifier/timeout_frac": _average(verdicts == "timeout"),
        "verifier/error_frac": _average(verdicts == "unparsable_gold"),
    }


def _terminated(lengths: np.ndarray) -> dict[str, float]:
    """Lengths of the completions that stopped by themselves."""
    some = len(lengths) > 0
    return {
        "completions/mean_terminated_length": _average(lengths),
        "completions/min_terminated_length": float(lengths.min()) if some else 0.0,
        "completions/max_terminated_length": float(lengths.max()) if some else 0.0,
    }


def _average(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _sums(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """float64, by group."""
    return np.bincount(group, np.asarray(values, float))


def _aligned(values: Any, group_ids: Any, valid: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values float64 [N] with 0 where invalid, group int [N] in 0.., valid bool [N]; checks the lengths."""
    values = np.asarray(values, np.float64)
    group_ids = np.asarray(group_ids)
    valid = np.ones(values.shape, bool) if valid is None else np.asarray(valid, bool)
    if not values.shape == group_ids.shape == valid.shape or values.ndim != 1:
        raise ValueError(
            f"values {values.shape}, group_ids {group_ids.shape} and valid {valid.shape} "
            "must be one-dimensional and equally long: one entry a completion"
        )
    group = np.unique(group_ids, return_inverse=True)[1].reshape(-1)
    return np.where(valid, values, 0.0), group, valid


def _known(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(names)}")
