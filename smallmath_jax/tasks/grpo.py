"""Small-Math-R1: SFT cold start, Adjusted GRPO, evaluation before and after, report, export.

One step: draw prompts, sample a group of answers each, grade and reward them, turn rewards into advantages and token
weights on the host, update. Every choice is a function of (seed, step), so a killed run continues bit for bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from smallmath_jax.data.batches import Sequence, epoch_order, make_sequence
from smallmath_jax.data.problems import load_problems
from smallmath_jax.parallel import hosts
from smallmath_jax.records import Completion, Problem, Prompt, draw_key, write_part
from smallmath_jax.report import pages
from smallmath_jax.rollout.engine import Engine, Limits, Rollout
from smallmath_jax.tasks import evaluate, export, grpo_metrics, runs, sft, training
from smallmath_jax.tasks.policy import (
    Policy,
    compute_dtype,
    load_policy,
    make_mesh,
    prompts_for,
    trainable,
)
from smallmath_jax.tasks.rollouts import Clock, Request, make_engine, rollout_weights, run_requests
from smallmath_jax.train import advantages as adv
from smallmath_jax.train.loop import MetricWriter, StopSignal
from smallmath_jax.train.optim import make_optimizer
from smallmath_jax.verify import rewards
from smallmath_jax.verify.grader import Grader


def run(config: Any, workdir: str) -> None:
    """The whole recipe; each stage is skipped when its result is there, continued when it is half done."""
    with runs.open_run(config, workdir) as this_run, StopSignal() as stop:
        mesh = make_mesh(config)
        problems = load_grpo_problems(
            config
        )  # all bad input is found before any device time is spent
        tests = evaluate.load_evaluation_problems(config)
        reward = rewards.from_config(config.reward)
        runs.say(rewards.value_table(reward))
        policy = load_policy(config, mesh)
        if config.cold_start:
            policy = sft.fine_tune(policy, config, this_run.workdir / "sft", mesh, stop)
        engine = make_engine(policy, config)
        if config.eval.before:
            sft.evaluate_stage(policy, engine, tests, config, this_run.workdir, "before")
        policy = improve(policy, engine, problems, reward, config, this_run.workdir, mesh, stop)
        if config.eval.after:
            sft.evaluate_stage(policy, engine, tests, config, this_run.workdir, "after")
        if config.export:
            export.export_policy(policy, this_run.workdir / "export")
        pages.write_report(this_run.workdir, wall_s=this_run.wall_s())
        runs.say(f"done in {this_run.wall_s():.0f} s; report: {workdir}/report/index.html")


def load_grpo_problems(config: Any) -> list[Problem]:
    problems = [
        problem
        for source in config.grpo.data
        for problem in load_problems(source, limit=config.grpo.problems or None, seed=config.seed)
    ]
    if len(problems) < config.grpo.prompts:
        raise ValueError(
            f"grpo.data: {len(problems)} problems in {list(config.grpo.data)}, fewer than one step's "
            f"{config.grpo.prompts} (grpo.prompts)"
        )
    return problems


def improve(
    policy: Policy,
    engine: Engine,
    problems: list[Problem],
    reward: rewards.RewardSettings,
    config: Any,
    workdir: Any,
    mesh: jax.sharding.Mesh,
    stop: StopSignal,
) -> Policy:
    """Adjusted GRPO for `config.grpo.steps` steps from the newest checkpoint, or from `policy`."""
    settings = config.grpo
    trainer = training.make_trainer(
        policy,
        config,
        settings,
        mesh,
        workdir,
        loss="grpo",
        total_updates=settings.steps * _updates_a_step(config),
    )
    state, first = trainer.restore_or_start()
    if first >= settings.steps:
        return dataclasses.replace(policy, model=state.model)
    problems, prompts, dropped = prompts_for(problems, policy, config)
    if dropped:
        runs.say(f"GRPO problems left out: {dropped}")
    writer = MetricWriter(workdir, host=hosts.host_index())
    writer.drop_after(first)
    bar = tqdm(total=settings.steps, initial=first, desc="grpo", unit="step")
    reference = trainer.reference_model(state.model) if settings.kl_beta else None
    with Grader() as grader:
        for step in range(first, settings.steps):
            clock = Clock()
            engine.set_weights(rollout_weights(state.model, compute_dtype(config)), step)
            chosen = step_problems(len(problems), step, settings.prompts, config.seed)
            groups = sample_groups(engine, [prompts[i] for i in chosen], config, step)
            clock.lap("generate")
            group_problems = [problems[i] for i in chosen]
            rows, parts = grade_groups(
                group_problems, prompts, chosen, groups, policy, reward, grader, step
            )
            clock.lap("grade")
            batch = group_batch([prompts[i] for i in chosen], groups, parts, config)
            state, loss_metrics = update(trainer, state, batch, config, step, reference)
            clock.lap("train")
            record = grpo_metrics.step_metrics(
                rows, parts, batch, loss_metrics, clock.seconds, engine.counters()
            )
            writer.write(step + 1, record)
            if step % config.log.samples_every == 0:
                grpo_metrics.log_samples(rows, config.log.samples, bar)
            write_part(
                workdir / "completions", f"{step + 1:08d}-host{hosts.host_index()}.jsonl", rows
            )
            bar.update(1)
            bar.set_postfix_str(grpo_metrics.postfix(record))
            trainer.maybe_save(step + 1, state, record, writer, last=stop.requested)
            if stop.requested:
                trainer.exit_saved(step + 1)
    bar.close()
    trainer.finish(settings.steps, state, writer)
    return dataclasses.replace(policy, model=state.model)


def _updates_a_step(config: Any) -> int:
    return config.grpo.updates * config.grpo.inner_epochs


def step_problems(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """Indices of a step's problems: a fresh shuffle each epoch, a pure function of (seed, step)."""
    chosen = []
    for position in range(step * per_step, (step + 1) * per_step):
        epoch, index = divmod(position, count)
        chosen.append(int(epoch_order(count, seed, epoch)[index]))
    return chosen


def sample_groups(
    engine: Engine, prompts: list[Prompt], config: Any, step: int
) -> list[list[Rollout]]:
    """A group of `group_size` rollouts for each prompt."""
    settings = config.grpo
    limits = Limits(max_tokens=settings.sampling.max_tokens)
    sampling = evaluate.sampling_of(settings.sampling)
    requests = [
        Request(
            prompt,
            np.stack(
                [
                    draw_key(config.seed, "grpo", prompt.problem_id, step, n)
                    for n in range(settings.group_size)
                ]
            ),
            limits,
            sampling,
        )
        for prompt in prompts
    ]
    groups: list[list[Rollout]] = [[] for _ in prompts]
    for index, rollouts in run_requests(engine, requests):
        groups[index] = rollouts
    return groups


def grade_groups(
    problems: list[Problem],
    prompts: list[Prompt],
    chosen: list[int],
    groups: list[list[Rollout]],
    policy: Policy,
    reward: rewards.RewardSettings,
    grader: Grader,
    step: int,
) -> tuple[list[Completion], list[list[rewards.RewardParts]]]:
    """Verdicts and rewards of all rollouts, as log rows and as parts by group."""
    rows: list[Completion] = []
    parts: list[list[rewards.RewardParts]] = []
    for problem, index, group in zip(problems, chosen, groups, strict=True):
        prompt = prompts[index]
        group_parts = []
        texts = [policy.tokens.decode(rollout.token_ids) for rollout in group]
        graded = grader.grade_many(
            [(problem.answer, text) for text in texts], mode="strict", prefix=prompt.prefix
        )
        for text, rollout, verdict in zip(texts, group, graded, strict=True):
            parsed = rewards.parse_think_answer(text, prompt.prefix)
            think_tokens = len(policy.tokens.encode(parsed.think)) if parsed.think else 0
            group_parts.append(
                rewards.reward(parsed, think_tokens, verdict.verdict, rollout.stop_reason, reward)
            )
        group_parts = rewards.finish_group(group_parts, reward)
        parts.append(group_parts)
        for sample, (text, rollout, verdict, part) in enumerate(
            zip(texts, group, graded, group_parts, strict=True)
        ):
            rows.append(
                evaluate.completion_row(
                    problem,
                    prompt,
                    rollout,
                    sample,
                    text,
                    verdict,
                    step + 1,
                    rewards=part.as_dict(),
                )
            )
    return rows, parts


@dataclasses.dataclass(frozen=True)
class GroupBatch:
    """A rollout batch ready to train on, and the numbers the log wants. N = prompts x group size."""

    sequences: list[Sequence]
    group_ids: np.ndarray  # int32 [N]
    advantages: np.ndarray  # float32 [N]
    lengths: np.ndarray  # int32 [N] completion tokens
    valid: np.ndarray  # bool [N]: neither masked for truncation nor ungradable


def group_batch(
    prompts: list[Prompt],
    groups: list[list[Rollout]],
    parts: list[list[rewards.RewardParts]],
    config: Any,
) -> GroupBatch:
    """Advantages and token weights (laws 1, 7, 9), computed once per generation batch."""
    settings = config.grpo
    flat = [rollout for group in groups for rollout in group]
    flat_parts = [part for group in parts for part in group]
    group_ids = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    lengths = np.asarray([len(rollout.token_ids) for rollout in flat], np.int32)
    valid = np.asarray([not part.masked for part in flat_parts], bool)
    totals = np.asarray([part.total for part in flat_parts], np.float64)
    values = adv.advantages(
        totals, group_ids, valid, scale=settings.advantage_scale, eps=settings.advantage_eps
    )
    sequences = []
    for prompt, group_id, rollout, advantage, keep in zip(
        np.repeat(np.asarray(prompts, object), [len(group) for group in groups]),
        group_ids,
        flat,
        values,
        valid,
        strict=True,
    ):
        tokens = np.asarray(rollout.token_ids, np.int32)
        full = lambda value: np.full(len(tokens), value, np.float32)
        sequences.append(
            make_sequence(
                prompt,
                tokens,
                weights=full(float(keep)),
                advantages=full(advantage),
                sampler_log_probs=np.asarray(rollout.log_probs, np.float32),
            )
        )
    return GroupBatch(sequences, group_ids, values.astype(np.float32), lengths, valid)


def update(
    trainer: "training.Trainer",
    state: Any,
    batch: GroupBatch,
    config: Any,
    step: int,
    reference: Any,
) -> tuple[Any, dict[str, float]]:
    """`updates` optimiser steps, each on its own groups, `inner_epochs` times over."""
    settings = config.grpo
    on_policy = settings.updates * settings.inner_epochs == 1
    sequences = batch.sequences
    if not on_policy:  # law 2: pi_old is the trainer's own, before the first update
        sequences = trainer.with_log_probs(sequences, state.model, "old_log_probs")
    if reference is not None:
        sequences = trainer.with_log_probs(sequences, reference, "reference_log_probs")
    groups = np.unique(batch.group_ids)
    collected: list[dict[str, float]] = []
    for epoch in range(settings.inner_epochs):
        order = epoch_order(len(groups), config.seed, step * settings.inner_epochs + epoch)
        for members in np.array_split(groups[order], settings.updates):
            mask = np.isin(batch.group_ids, members)
            weights = adv.token_weights(
                settings.denominator,
                batch.lengths[mask],
                batch.group_ids[mask],
                batch.valid[mask],
                max_length=settings.sampling.max_tokens,
            )
            chosen = [sequences[i] for i in np.flatnonzero(mask)]
            weighted = [
                dataclasses.replace(sequence, weights=sequence.weights * weight)
                for sequence, weight in zip(chosen, weights, strict=True)
            ]
            state, metrics = trainer.step(state, weighted)
            collected.append(metrics)
    return state, grpo_metrics.mean_metrics(collected)


RewardFunction = Callable[..., float]
