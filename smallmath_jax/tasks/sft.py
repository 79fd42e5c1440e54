"""Supervised fine-tuning on worked solutions: alone, or as the cold start of GRPO (Small-Math-R1, section 3.2.1)."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from smallmath_jax.data.batches import RowPlan, Sequence, make_sequence, plan_rows, sft_rows
from smallmath_jax.data.prompts import GRAMMARS, format_completion
from smallmath_jax.data.tiny import is_embedded, worked_solution
from smallmath_jax.data.tokens import completion_ids
from smallmath_jax.records import Problem, draw_key
from smallmath_jax.report import pages
from smallmath_jax.tasks import evaluate, export, runs, stages, training
from smallmath_jax.tasks.policy import (
    Policy,
    load_policy,
    make_mesh,
    prompts_for,
    restore_model,
    with_pixels,
)
from smallmath_jax.tasks.rollouts import make_engine
from smallmath_jax.tasks.sources import training_problems
from smallmath_jax.train.loop import StopSignal


def run(config: Any, workdir: str) -> None:
    """Fine-tunes, evaluates before and after as the config says, exports, reports."""
    with runs.open_run(config, workdir) as this_run, StopSignal() as stop:
        mesh = make_mesh(config)
        tests = evaluate.load_evaluation_problems(config)
        policy = load_policy(config, mesh)
        done = stages.is_done(this_run.workdir)
        lessons = None if done else load_lessons(policy, config, this_run.workdir)
        if config.eval.before:
            stages.evaluate_stage(
                policy, make_engine(policy, config), tests, config, this_run.workdir, "before", stop
            )
        policy = fine_tune(policy, config, this_run.workdir, mesh, stop, lessons)
        if config.eval.after:
            stages.evaluate_stage(
                policy, make_engine(policy, config), tests, config, this_run.workdir, "after", stop
            )
        if config.export:
            export.export_policy(policy, this_run.workdir / "export")
        pages.write_report(this_run.workdir, wall_s=this_run.wall_s())
        runs.say(f"done in {this_run.wall_s():.0f} s; report: {workdir}/report/index.html")


def fine_tune(
    policy: Policy,
    config: Any,
    folder: epath.Path,
    mesh: jax.sharding.Mesh,
    stop: StopSignal,
    loaded: tuple[list["Lessons"], dict[str, int]] | None = None,
) -> Policy:
    """The policy after `config.sft`, its metrics and checkpoints in `folder`; finished stages are only restored.

    `loaded` is what `load_lessons` gave earlier. The weights of `policy` are used up.
    """
    settings = config.sft
    if stages.is_done(folder):
        return dataclasses.replace(
            policy, model=restore_model(folder / "checkpoints", policy.model, mesh)
        )
    lessons, left_out = loaded or load_lessons(policy, config, folder)
    announce(lessons[-1], left_out)
    return learn(policy, lessons, settings, config, folder, mesh, stop)


def learn(
    policy: Policy,
    lessons: list["Lessons"],
    settings: Any,
    config: Any,
    folder: epath.Path,
    mesh: jax.sharding.Mesh,
    stop: StopSignal,
    title: str = "sft",
) -> Policy:
    """The policy after `settings.steps` steps on lessons (0: `epochs` passes); of two, the first for `worked_steps`.

    The weights of `policy` are used up.
    """
    settings = training.fit_rows(settings, mesh)
    total = settings.steps or settings.epochs * lessons[-1].plan.steps_per_epoch
    trainer = training.make_trainer(
        policy,
        config,
        settings,
        mesh,
        loss="sft",
        total_updates=total,
        microbatches=math.ceil(settings.rows / settings.microbatch_rows),
    )
    with stages.Stage(folder, config, trainer, total, title, stop) as stage:
        state = stage.restore_or_start(policy.model)
        seen, since, shown = 0, time.perf_counter(), {}
        for step in range(stage.first, total):
            phase = lessons[0] if step < settings.worked_steps else lessons[-1]
            rows = phase.rows(policy, config.seed, step)
            state, metrics = trainer.step_rows(state, rows)
            tokens = sum(len(sequence.token_ids) for row in rows for sequence in row)
            seen += tokens
            record = {**metrics, "num_tokens": tokens}
            if (step + 1) % config.log.every == 0 or step + 1 == total:
                shown = _shown(metrics)  # waits for the device, so that the clock tells the truth
                record["tokens_per_second"] = seen / (time.perf_counter() - since)
                shown["tok/s"] = record["tokens_per_second"]
                seen, since = 0, time.perf_counter()
            stage.log(step + 1, record)
            stage.advance(step + 1, state, **shown)
        return dataclasses.replace(policy, model=state.model)


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What a phase teaches: sequences, the problems they come from (for their pictures), and their packing."""

    sequences: list[Sequence]
    problems: list[Problem]
    plan: RowPlan

    def rows(self, policy: Policy, seed: int, step: int) -> list[list[Sequence]]:
        """The packed rows of a step, weights summing to 1."""
        get = lambda index: with_pixels(self.sequences[index], self.problems[index], policy)
        return sft_rows(get, self.plan, seed, step)


def load_lessons(
    policy: Policy, config: Any, folder: epath.Path
) -> tuple[list[Lessons], dict[str, int]]:
    """The lessons of `config.sft`, and what was left out by reason.

    One phase, or two where `worked_steps` > 0: embedded problems are then first taught with worked solutions only, and
    from that step on a share `terse_share` of them with terse ones.
    """
    settings = config.sft
    problems = training_problems(settings.data, settings.problems, config, folder, "sft.data")
    kept, prompts, left_out = prompts_for(problems, policy, config, prefix="")
    shares = [0.0, settings.terse_share] if settings.worked_steps else [settings.terse_share]
    lessons = []
    for share in shares:
        texts = [solution_text(problem, config, share) for problem in kept]
        taught = [
            (problem, make_sequence(prompt, solution_ids(problem, text, policy)))
            for problem, prompt, text in zip(kept, prompts, texts, strict=True)
            if text is not None
        ]
        if not taught:
            raise ValueError(
                f"sft.data: none of {len(problems)} problems can be trained on; left out: {left_out}"
            )
        lessons.append(pack_lessons(taught, policy, settings))
    if len(taught) < len(kept):
        left_out = {**left_out, "no_solution": len(kept) - len(taught)}
    return lessons, left_out


def pack_lessons(taught: list[tuple[Problem, Sequence]], policy: Policy, settings: Any) -> Lessons:
    """Sequences, each with its problem, packed into the rows of `settings`; those longer than a row are dropped."""
    sequences = [sequence for _, sequence in taught]
    plan = plan_rows(
        [len(sequence.token_ids) for sequence in sequences],
        [sequence.patches for sequence in sequences],
        [float(sequence.weights.sum()) for sequence in sequences],
        row_length=settings.row_length,
        row_patches=settings.row_patches if policy.config.vision is not None else 0,
        rows_per_step=settings.rows,
        over="drop",
    )
    return Lessons(sequences, [problem for problem, _ in taught], plan)


def solution_text(problem: Problem, config: Any, terse_share: float) -> str | None:
    """The completion to learn, in the config's grammar; None without a solution.

    Embedded problems have a style drawn by the problem's id. Raises ValueError naming the problem whose solution the
    grammar cannot hold.
    """
    if is_embedded(problem):
        terse = draw_key(config.seed, "style", problem.id)[0] / 2**32 < terse_share
        return worked_solution(problem, config.prompt.grammar, "terse" if terse else "worked")
    if not problem.solution:
        return None
    with _named(problem):
        return format_completion(problem.solution, problem.answer, GRAMMARS[config.prompt.grammar])


def solution_ids(problem: Problem, text: str, policy: Policy) -> np.ndarray:
    """Ids of a completion to learn, int32 [N]. Raises ValueError naming the problem if no policy could sample them."""
    with _named(problem):
        return completion_ids(text, policy.tokens)


@contextlib.contextmanager
def _named(problem: Problem) -> Iterator[None]:
    """Says of which problem a ValueError is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"problem {problem.id!r}: {error}") from error


def announce(lessons: Lessons, left_out: dict[str, int]) -> None:
    """Says how much there is to learn."""
    plan = lessons.plan
    if plan.dropped:
        left_out = {**left_out, "longer_than_a_row": len(plan.dropped)}
    tokens = np.sum([len(sequence.token_ids) for sequence in lessons.sequences])
    runs.say(
        f"SFT: {len(lessons.sequences)} solutions, {tokens:,} tokens in {len(plan.rows)} rows, "
        f"{plan.steps_per_epoch} steps an epoch" + (f"; left out {left_out}" if left_out else "")
    )


def _shown(metrics: dict[str, Any]) -> dict[str, float]:
    """The bar's numbers."""
    names = {"loss": "loss", "accuracy": "mean_token_accuracy"}
    return {label: float(metrics[name]) for label, name in names.items() if name in metrics}
