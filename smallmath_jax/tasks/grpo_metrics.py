"""What a GRPO step tells: TRL's metric names, and those that show why a run goes wrong (docs/metrics.md)."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from smallmath_jax.records import Completion
from smallmath_jax.train import advantages as adv


def step_metrics(
    batch: Any,
    loss_metrics: dict[str, float],
    seconds: dict[str, float],
    counters: dict[str, float],
) -> dict[str, float]:
    """One step's record, of a tasks.grpo.GroupBatch over all hosts; `counters` are this host's engine's."""
    rows = batch.rows
    record = adv.batch_metrics(
        [row["rewards"]["total"] for row in rows],
        batch.advantages,
        batch.group_ids,
        batch.lengths,
        [row["stop_reason"] for row in rows],
        [row["verdict"] for row in rows],
        batch.valid,
        gated=batch.gated,
    )
    for name in sorted(set(rows[0]["rewards"]) - {"total", "masked"}):
        values = np.asarray([row["rewards"][name] for row in rows], np.float64)
        record[f"rewards/{name}/mean"] = float(values.mean())
        record[f"rewards/{name}/std"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    record |= loss_metrics
    record |= {f"time/{phase}_s": round(value, 3) for phase, value in seconds.items()}
    record["step_time"] = float(sum(seconds.values()))
    record["num_tokens"] = int(batch.lengths.sum())
    record["tokens_per_second"] = float(batch.lengths.sum() / max(record["step_time"], 1e-9))
    record |= {f"engine/{name}": value for name, value in counters.items()}
    record["recompile/count"] = counters.get("recompilations", 0)
    return record


def mean_metrics(collected: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Metrics of several updates as one: means, but minima and maxima of names that say so."""
    collected = jax.device_get(collected)
    combined = {}
    for name in collected[0] if collected else ():
        values = [float(metrics[name]) for metrics in collected if name in metrics]
        last = name.rsplit("/", 1)[-1]
        combine = np.min if last.endswith("min") else np.max if last.endswith("max") else np.mean
        combined[name] = float(combine(values))
    return combined


def shown(record: dict[str, float]) -> dict[str, float]:
    """The numbers people watch, behind the progress bar."""
    return {
        "reward": record["reward"],
        "accuracy": record["accuracy"],
        "length": record["completions/mean_length"],
        "tok/s": record["tokens_per_second"],
    }


def log_samples(rows: list[Completion], count: int, write: Callable[[str], None]) -> None:
    """A few completions for the log: the best and the worst rewarded first."""
    ordered = sorted(rows, key=lambda row: row.rewards["total"])
    chosen = [ordered[-1], ordered[0]] + ordered[1:-1]
    for row in chosen[:count]:
        question = row.prompt[-160:].replace("\n", " ")
        write(
            f"--- {row.problem_id} reward {row.rewards['total']:.2f} ({row.verdict}, gold {row.gold})"
        )
        write(f"    …{question}\n    > {row.text[:400]}")
