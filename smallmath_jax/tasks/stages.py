"""What every training stage does around its steps: resume, log, checkpoint, stop on SIGTERM; and staged evaluations."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import Completion, Problem, write_part
from smallmath_jax.rollout.engine import Engine
from smallmath_jax.tasks import evaluate, runs
from smallmath_jax.tasks.policy import Policy
from smallmath_jax.tasks.training import Trainer
from smallmath_jax.train.checkpoint import Checkpoints
from smallmath_jax.train.loop import MetricWriter, Progress, StopSignal


def evaluate_stage(
    policy: Policy, engine: Engine, problems: list[Problem], config: Any, workdir: epath.Path, name: str
) -> dict[str, Any]:
    """The evaluation WORKDIR/eval/NAME, done once; again with `config.eval.forced_prefix` where that is set."""
    results = {}
    for label, prefix in ((name, None), (f"{name}_forced", config.eval.get("forced_prefix") or None)):
        if label != name and prefix is None:
            continue
        folder = workdir / "eval" / label
        if (folder / "result.json").exists():
            results[label] = json.loads((folder / "result.json").read_text())
        else:
            results[label] = evaluate.evaluate(policy, engine, problems, config, folder, prefix)
        shown = results[label]
        runs.say(
            f"{label}: {shown['decoding']} {shown['accuracy']:.1%} of {shown['n']} "
            f"[{shown['ci'][0]:.1%}, {shown['ci'][1]:.1%}]"
        )
    return results[name]
