"""What a GRPO step tells: TRL's metric names, and those that show why a run goes wrong (docs/metrics.md)."""

from typing import Any

import numpy as np
from tqdm import tqdm

from smallmath_jax.records import Completion


def step_metrics(
    rows: list[Completion],
    batch: Any,
    loss_metrics: dict[str, float],
    seconds: dict[str, float],
    counters: dict[str, float],
) -> dict[str, float]:
    """One step's record. `rows` are all completions, group after group, beside `batch` (tasks.grpo.GroupBatch)."""
    totals = np.asarray([row.rewards["total"] for row in rows])
    correct = np.asarray([row.verdict == "correct" for row in rows])
    graded = np.asarray([row.verdict in ("correct", "wrong", "no_answer") for row in rows])
    stopped = np.asarray([row.stop_reason != "length" for row in rows])
    record: dict[str, float] = {}
    record |= _reward_metrics(rows, totals, batch)
    record |= _length_metrics(batch.lengths, stopped, correct)
    record |= _group_metrics(batch, totals, correct)
    record["accuracy"] = float(correct[graded].mean()) if graded.any() else 0.0
    for outcome in ("timeout", "unparsable_gold", "no_answer"):
        record[f"verifier/{outcome}_frac"] = float(
            np.mean([row.verdict == outcome for row in rows])
        )
    kept = batch.lengths * batch.valid
    record["adv/token_weighted_mean"] = float((batch.advantages * kept).sum() / max(kept.sum(), 1))
    record |= loss_metrics
    record |= {f"time/{phase}_s": round(value, 3) for phase, value in seconds.items()}
    record["step_time"] = float(sum(seconds.values()))
    record["num_tokens"] = int(batch.lengths.sum())
    record["tokens_per_second"] = float(batch.lengths.sum() / max(record["step_time"], 1e-9))
    record |= {f"engine/{name}": value for name, value in counters.items()}
    record["recompile/count"] = counters.get("recompilations", 0)
    return record


def _reward_metrics(rows: list[Completion], totals: np.ndarray, batch: Any) -> dict[str, float]:
    record = {"reward": float(totals.mean())}
    stds = [
        totals[batch.group_ids == group].std(ddof=1)
        if (batch.group_ids == group).sum() > 1
        else 0.0
        for group in np.unique(batch.group_ids)
    ]
    record["reward_std"] = float(np.mean(stds))
    names = [name for name in rows[0].rewards if name != "total"]
    for name in names:
        values = np.asarray([row.rewards[name] for row in rows], np.float64)
        record[f"rewards/{name}/mean"] = float(values.mean())
        record[f"rewards/{name}/std"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return record


def _length_metrics(
    lengths: np.ndarray, stopped: np.ndarray, correct: np.ndarray
) -> dict[str, float]:
    record = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/clipped_ratio": float(1 - stopped.mean()),
    }
    if stopped.any():
        record["completions/mean_terminated_length"] = float(lengths[stopped].mean())
        record["completions/min_terminated_length"] = int(lengths[stopped].min())
        record["completions/max_terminated_length"] = int(lengths[stopped].max())
    if correct.any():
        record["length/correct_mean"] = float(lengths[correct].mean())
    if not correct.all():
        record["length/wrong_mean"] = float(lengths[~correct].mean())
    return record


def _group_metrics(batch: Any, totals: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Shares of groups; `gated`: no gradient, since all rewards that count are equal."""
    kinds = {"all_correct": 0, "all_wrong": 0, "mixed": 0, "gated": 0}
    zero_std = 0
    groups = np.unique(batch.group_ids)
    for group in groups:
        members = batch.group_ids == group
        right = correct[members]
        kinds["all_correct" if right.all() else "mixed" if right.any() else "all_wrong"] += 1
        values = totals[members]
        zero_std += values.max() == values.min()
        kinds["gated"] += not np.any(batch.advantages[members & batch.valid])
    record = {f"groups/{kind}": count / len(groups) for kind, count in kinds.items()}
    record["frac_reward_zero_std"] = float(zero_std / len(groups))
    return record


def mean_metrics(collected: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of several updates as one: means, but minima and maxima of names that say so."""
    combined = {}
    for name in collected[0]:
        values = [float(metrics[name]) for metrics in collected if name in metrics]
        last = name.rsplit("/", 1)[-1]
        combine = np.min if last.endswith("min") else np.max if last.endswith("max") else np.mean
        combined[name] = float(combine(values))
    return combined


def postfix(record: dict[str, float]) -> str:
    """The numbers people watch, behind the progress bar."""
    return (
        f"reward {record['reward']:.2f} accuracy {record['accuracy']:.1%} "
        f"length {record['completions/mean_length']:.0f} {record['tokens_per_second']:,.0f} tok/s"
    )


def log_samples(rows: list[Completion], count: int, bar: tqdm) -> None:
    """A few completions above the bar: the best and the worst rewarded first."""
    ordered = sorted(rows, key=lambda row: row.rewards["total"])
    chosen = [ordered[-1], ordered[0]] + ordered[1:-1]
    for row in chosen[:count]:
        question = row.prompt[-160:].replace("\n", " ")
        bar.write(
            f"--- {row.problem_id} reward {row.rewards['total']:.2f} ({row.verdict}, gold {row.gold})"
        )
        bar.write(f"    …{question}\n    > {row.text[:400]}")
