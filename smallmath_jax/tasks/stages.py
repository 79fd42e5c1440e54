"""What every training stage does around its steps: resume, log, checkpoint, stop on SIGTERM; and staged evaluations."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import Completion, Problem, write_part, write_text
from smallmath_jax.rollout.engine import Engine
from smallmath_jax.tasks import evaluate, runs
from smallmath_jax.tasks.policy import Policy
from smallmath_jax.tasks.training import Trainer
from smallmath_jax.train.checkpoint import Checkpoints
from smallmath_jax.train.loop import MetricWriter, Progress, StopSignal, agreed_exit, part_name

WORST = -1e30


def is_done(folder: epath.Path) -> bool:
    """Whether the stage in `folder` has run to its end."""
    return (folder / "done.json").exists()


class Stage:
    """One training stage of a run, in `folder`: metrics/, completions/, checkpoints/, tensorboard/.

    Killed at any moment and entered again it continues from its newest checkpoint: records later than that are
    dropped before the first new one is written (law 6).
    """

    def __init__(
        self, folder: Any, config: Any, trainer: Trainer, total: int, name: str, stop: StopSignal
    ):
        self.folder = epath.Path(folder)
        self.first = 0
        self._config, self._trainer, self._total = config, trainer, total
        self._name, self._stop = name, stop
        best = config.checkpoint.best if name == "grpo" else ""
        self._best = best
        self._checkpoints = Checkpoints(
            self.folder / "checkpoints", keep=config.checkpoint.keep, best_metric=best
        )
        self._writer = MetricWriter(self.folder, host=hosts.host_index())
        self._watchdog = hosts.watchdog(config.watchdog_s)
        self._bar: Progress | None = None
        self._record: dict[str, Any] = {}

    def __enter__(self) -> "Stage":
        self._watchdog.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._watchdog.__exit__(None, None, None)
        self._checkpoints.close()
        self._writer.close()
        if self._bar is not None:
            self._bar.close()

    def restore_or_start(self, model: Any) -> Any:
        """The stage's TrainState; `first` becomes the step to run next.

        `model` is used up, so that the fp32 weights lie in memory once: the state takes its buffers, or they are freed
        before a checkpoint is read.
        """
        trainer = self._trainer
        if hosts.broadcast(self._checkpoints.latest_step() is not None):
            for leaf in jax.tree.leaves(model):
                leaf.delete()
        like = jax.eval_shape(trainer.init_fn, trainer.policy.model)
        found = self._checkpoints.restore(like, trainer.state_shardings)
        if found is None:
            state = trainer.init_fn(model)
        else:
            state, cursor = found
            self.first = int(cursor["step"])
            if self.first < self._total:
                runs.say(f"{self._name}: continuing after step {self.first}")
        self._writer.drop_after(self.first)
        if self.first < self._total:
            quiet = hosts.host_index() != 0
            self._bar = Progress(self._total, self._name, initial=self.first, quiet=quiet)
        return state

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Logs a step's record (device scalars are welcome)."""
        self._record = record
        self._writer.write(step, record)

    def keep_completions(self, step: int, rows: list[Completion]) -> None:
        """Publishes this host's completions of a step."""
        write_part(self.folder / "completions", part_name(step, hosts.host_index()), rows)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self._bar is not None:
            self._bar.say(text)

    @contextlib.contextmanager
    def saving_on_exit(self, done: int, state: Any, record: dict[str, Any]) -> Iterator[None]:
        """Around what may leave the run at the end of step `done`: its record and state are saved first."""
        try:
            yield
        except SystemExit:
            self.log(done, record)
            self._save(done, state)
            self._checkpoints.wait()
            raise

    def _save(self, done: int, state: Any) -> None:
        self._writer.flush()
        # A step without the metric (nothing taught, no evaluation) is never the best one.
        metrics = {self._best: self._record.get(self._best, WORST)} if self._best else None
        self._checkpoints.save(done, state, metrics=metrics)

    def advance(self, done: int, state: Any, **shown: Any) -> None:
        """Counts a step, saves when it is time, and leaves with exit code 143 after SIGTERM once all is saved."""
        hosts.beat(f"{self._name} step {done}")
        self._bar.advance(1, **shown)
        leaving = agreed_exit(self._stop)
        if leaving or done == self._total or done % self._config.checkpoint.every == 0:
            self._save(done, state)
        if done == self._total:
            self._checkpoints.wait()
            if hosts.host_index() == 0:
                write_text(self.folder / "done.json", json.dumps({"step": done}))
        if leaving and done < self._total:
            self._checkpoints.wait()
            runs.say(
                f"{self._name}: stopped after step {done}, everything is saved; the same command continues"
            )
            sys.exit(leaving)


def evaluate_stage(
    policy: Policy,
    engine: Engine,
    problems: list[Problem],
    config: Any,
    workdir: epath.Path,
    name: str,
    stop: StopSignal | None = None,
) -> dict[str, Any]:
    """The evaluation WORKDIR/eval/NAME, done once; again with `config.eval.forced_prefix` where that is set.

    After a signal to `stop` it leaves once the part under way is on disk.
    """
    results = {}
    for label, prefix in (
        (name, None),
        (f"{name}_forced", config.eval.get("forced_prefix") or None),
    ):
        if label != name and prefix is None:
            continue
        folder = workdir / "eval" / label
        if (folder / "result.json").exists():
            results[label] = json.loads((folder / "result.json").read_text())
        else:
            results[label] = evaluate.evaluate(
                policy, engine, problems, config, folder, prefix, stop=stop
            )
        shown = results[label]
        runs.say(
            f"{label}: {shown['decoding']} {shown['accuracy']:.1%} of {shown['n']} "
            f"[{shown['ci'][0]:.1%}, {shown['ci'][1]:.1%}]"
        )
    return results[name]
