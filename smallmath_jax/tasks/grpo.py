"""Small-Math-R1: SFT cold start, Adjusted GRPO, evaluation before and after, report, export.

One step: draw prompts, sample a group of answers each, grade and reward them, turn rewards into advantages and token
weights on the host, update. Every choice is a function of (seed, step), so a killed run continues bit for bit.

On a pod each host samples and grades its share of the prompts on its own devices; then the hosts exchange the
completions, and all build the same batch.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from smallmath_jax.data.batches import Sequence, epoch_order, make_sequence
from smallmath_jax.data.tokens import decode
from smallmath_jax.parallel import hosts
from smallmath_jax.records import Completion, Problem, Prompt, draw_key
from smallmath_jax.report import pages
from smallmath_jax.rollout.engine import Engine, Limits, Rollout
from smallmath_jax.tasks import evaluate, export, grpo_metrics, runs, sft, stages, training
from smallmath_jax.tasks.completions import completion_row
from smallmath_jax.tasks.policy import (
    Policy,
    load_policy,
    make_mesh,
    prompts_for,
    restore_model,
    with_pixels,
)
from smallmath_jax.tasks.rollouts import (
    Clock,
    Request,
    engine_weights,
    make_engine,
    run_requests,
    sampling_of,
)
from smallmath_jax.tasks.sources import training_problems
from smallmath_jax.train import advantages as adv
from smallmath_jax.train.loop import StopSignal
from smallmath_jax.verify import rewards
from smallmath_jax.verify.grader import Grader


def run(config: Any, workdir: str) -> None:
    """The whole recipe; each stage is skipped when its result is there, continued when it is half done."""
    with runs.open_run(config, workdir) as this_run, StopSignal() as stop:
        mesh = make_mesh(config)
        problems = load_grpo_problems(
            config, this_run.workdir
        )  # bad input is found before any device time is spent
        tests = evaluate.load_evaluation_problems(config)
        reward = rewards.from_config(config.reward)
        told = (
            rewards.rehearse(reward, problems[0])
            if reward.function
            else rewards.value_table(reward)
        )
        runs.say(told)
        policy = load_policy(config, mesh)
        asked = ask(problems, policy, config)
        if config.cold_start:
            policy = sft.fine_tune(policy, config, this_run.workdir / "sft", mesh, stop)
        engine = make_engine(policy, config)
        if config.eval.before:
            stages.evaluate_stage(policy, engine, tests, config, this_run.workdir, "before", stop)
        policy = improve(policy, engine, asked, tests, reward, config, this_run.workdir, mesh, stop)
        engine.set_weights(engine_weights(policy.model, config), config.grpo.steps)
        if config.eval.after:
            stages.evaluate_stage(policy, engine, tests, config, this_run.workdir, "after", stop)
        if config.export:
            export.export_policy(policy, this_run.workdir / "export")
        pages.write_report(this_run.workdir, wall_s=this_run.wall_s())
        runs.say(f"done in {this_run.wall_s():.0f} s; report: {workdir}/report/index.html")


def load_grpo_problems(config: Any, folder: Any) -> list[Problem]:
    """The problems of `config.grpo`. Raises ValueError when they or the sampling settings cannot be trained on."""
    _check_sampling(config.grpo.sampling)
    problems = training_problems(
        config.grpo.data, config.grpo.problems, config, folder, "grpo.data"
    )
    if len(problems) < config.grpo.prompts:
        raise ValueError(
            f"grpo.data: {len(problems)} problems in {list(config.grpo.data)}, fewer than one step's "
            f"{config.grpo.prompts} (grpo.prompts)"
        )
    return problems


def ask(problems: list[Problem], policy: Policy, config: Any) -> tuple[list[Problem], list[Prompt]]:
    """Problems and their prompts, without those that are too long. Raises ValueError when too few are left."""
    kept, prompts, left_out = prompts_for(problems, policy, config)
    if left_out:
        runs.say(f"GRPO problems left out: {left_out}")
    if len(kept) < config.grpo.prompts:
        raise ValueError(
            f"grpo.data: {len(kept)} of {len(problems)} problems are left, fewer than one step's {config.grpo.prompts} "
            f"(grpo.prompts); left out: {left_out} (prompt.max_tokens {config.prompt.max_tokens}, "
            f"vision.max_patches {config.vision.max_patches})"
        )
    return kept, prompts


def _check_sampling(sampling: Any) -> None:
    """Refuses settings under which sampler and trainer would score tokens by two distributions (law 2)."""
    if sampling.top_p < 1 or sampling.top_k or not sampling.temperature:
        raise ValueError(
            f"grpo.sampling: top_p {sampling.top_p}, top_k {sampling.top_k}, temperature {sampling.temperature}; the "
            "trainer scores tokens among all that can be sampled, so leave top_p at 1 and top_k at 0, and sample at a "
            "temperature above 0 (eval.sampling is free)"
        )


def improve(
    policy: Policy,
    engine: Engine,
    asked: tuple[list[Problem], list[Prompt]],
    tests: list[Problem],
    reward: rewards.RewardSettings,
    config: Any,
    workdir: Any,
    mesh: jax.sharding.Mesh,
    stop: StopSignal,
) -> Policy:
    """Adjusted GRPO for `config.grpo.steps` steps from the newest checkpoint, or from `policy`.

    The weights of `policy` are used up. `asked` are problems and their prompts; every `config.grpo.eval_every` steps
    `tests` are evaluated.
    """
    settings = config.grpo
    if stages.is_done(workdir):
        return dataclasses.replace(
            policy, model=restore_model(workdir / "checkpoints", policy.model, mesh)
        )
    problems, prompts = asked
    trainer = make_grpo_trainer(policy, prompts, config, mesh)
    with (
        stages.Stage(workdir, config, trainer, settings.steps, "grpo", stop) as stage,
        Grader() as grader,
    ):
        reference = jax.tree.map(lambda x: x + 0, policy.model) if settings.kl_beta else None
        state = stage.restore_or_start(policy.model)
        for step in range(stage.first, settings.steps):
            clock = Clock()
            engine.set_weights(engine_weights(state.model, config), step)
            chosen = step_problems(len(problems), step, settings.prompts, config.seed)
            asked = [with_pixels(prompts[index], problems[index], policy) for index in chosen]
            share = hosts.share(list(enumerate(chosen)))
            groups = sample_groups(engine, [asked[place] for place, _ in share], config, step)
            clock.lap("generate")
            mine = [
                grade_group(
                    place, problems[index], prompts[index], group, policy, reward, grader, step
                )
                for (place, index), group in zip(share, groups, strict=True)
            ]
            rows = exchange(mine)
            clock.lap("grade")
            batch = group_batch(asked, rows, config)
            state, metrics = update(trainer, state, batch, config, step, reference)
            clock.lap("train")
            record = grpo_metrics.step_metrics(batch, metrics, clock.seconds, engine.counters())
            local = [row for found in mine for row in found]
            stage.keep_completions(step + 1, local)
            if settings.eval_every and (step + 1) % settings.eval_every == 0:
                engine.set_weights(engine_weights(state.model, config), step + 1)
                with stage.saving_on_exit(step + 1, state, record):
                    found = stages.evaluate_stage(
                        policy, engine, tests, config, workdir, f"step_{step + 1}", stop
                    )
                record["eval/accuracy"] = found["accuracy"]
            stage.log(step + 1, record)
            if step % config.log.samples_every == 0:
                grpo_metrics.log_samples(local, config.log.samples, stage.say)
            stage.advance(step + 1, state, **grpo_metrics.shown(record))
        return dataclasses.replace(policy, model=state.model)


def make_grpo_trainer(
    policy: Policy, prompts: list[Prompt], config: Any, mesh: jax.sharding.Mesh
) -> training.Trainer:
    settings = training.fit_rows(config.grpo, mesh)
    longest = max(len(prompt.token_ids) for prompt in prompts) + settings.sampling.max_tokens
    patches = max(int(prompt.grids.prod(-1).sum()) for prompt in prompts)
    per_update = -(-settings.prompts // settings.updates) * settings.group_size
    return training.make_trainer(
        policy,
        config,
        settings,
        mesh,
        loss="grpo",
        total_updates=settings.steps * settings.updates * settings.inner_epochs,
        microbatches=training.microbatches_for(per_update, longest, patches, settings),
        loss_settings={
            "epsilon_low": settings.epsilon_low,
            "epsilon_high": settings.epsilon_high,
            "kl_beta": settings.kl_beta,
            "importance_cap": settings.importance_cap or None,
        },
    )


def step_problems(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """Indices of a step's problems, none twice: a pure function of (seed, step).

    An epoch is a fresh shuffle cut into whole steps; the fewer than `per_step` problems behind the last one sit this
    epoch out. A step across two epochs could ask a problem twice, with the same draws. `count` is at least `per_step`.
    """
    epoch, place = divmod(step, count // per_step)
    order = epoch_order(count, seed, epoch)[place * per_step : (place + 1) * per_step]
    return [int(index) for index in order]


def sample_groups(
    engine: Engine, prompts: list[Prompt], config: Any, step: int
) -> list[list[Rollout]]:
    """A group of `group_size` rollouts for each prompt."""
    settings = config.grpo
    limits = Limits(max_tokens=settings.sampling.max_tokens)
    sampling = sampling_of(settings.sampling)
    keys = lambda prompt: np.stack(
        [
            draw_key(config.seed, "grpo", prompt.problem_id, step, n)
            for n in range(settings.group_size)
        ]
    )
    requests = [Request(prompt, keys(prompt), limits, sampling) for prompt in prompts]
    groups: list[list[Rollout]] = [[] for _ in prompts]
    for index, rollouts in run_requests(engine, requests):
        groups[index] = rollouts
    return groups


def grade_group(
    place: int,
    problem: Problem,
    prompt: Prompt,
    group: list[Rollout],
    policy: Policy,
    reward: rewards.RewardSettings,
    grader: Grader,
    step: int,
) -> list[Completion]:
    """Verdicts and rewards of one prompt's rollouts; `place` is the prompt's in the step's batch."""
    texts = [decode(policy.tokens, rollout.token_ids) for rollout in group]
    graded = grader.grade_many(
        [(problem.accepted, text) for text in texts], mode="strict", prefix=prompt.prefix
    )
    parts = []
    for text, rollout, verdict in zip(texts, group, graded, strict=True):
        parsed = rewards.parse_think_answer(text, prompt.prefix)
        counted = rewards.counted_text(parsed, text, prompt.prefix, reward)
        think = policy.tokens.tokenizer.encode(counted, add_special_tokens=False) if counted else ()
        parts.append(
            rewards.reward(
                parsed,
                len(think),
                verdict.verdict,
                rollout.stop_reason,
                reward,
                problem=problem,
                text=text,
            )
        )
    gated = rewards.is_gated(parts, reward)
    return [
        completion_row(
            problem,
            prompt,
            rollout,
            sample,
            text,
            verdict,
            step + 1,
            rewards=part.as_dict(),
            extra={"place": place, "masked": part.masked, "gated": gated},
        )
        for sample, (text, rollout, verdict, part) in enumerate(
            zip(texts, group, graded, rewards.gate_lengths(parts, reward), strict=True)
        )
    ]


def exchange(groups: list[list[Completion]]) -> list[dict[str, Any]]:
    """What training needs of every host's completions, in the batch's order, on every host."""
    fields = ("token_ids", "logprobs", "rewards", "verdict", "stop_reason", "sample", "extra")
    mine = [{name: getattr(row, name) for name in fields} for group in groups for row in group]
    rows = [row for part in hosts.gather(mine) for row in part] if hosts.host_count() > 1 else mine
    return sorted(rows, key=lambda row: (row["extra"]["place"], row["sample"]))


@dataclasses.dataclass(frozen=True)
class GroupBatch:
    """A rollout batch ready to train on. N = completions of the step, over all hosts, group after group."""

    rows: list[dict[str, Any]]  # [N]
    sequences: list[Sequence]  # [N], weight 1 on each completion token
    group_ids: np.ndarray  # int32 [N]
    advantages: np.ndarray  # float64 [N]
    lengths: np.ndarray  # int32 [N] completion tokens
    valid: np.ndarray  # bool [N]: neither masked for truncation nor ungradable
    gated: np.ndarray  # bool [N]: the reward preset replaced the length terms of its group


def group_batch(prompts: list[Prompt], rows: list[dict[str, Any]], config: Any) -> GroupBatch:
    """Advantages of a step's completions (laws 7 and 9), once per generation batch."""
    settings = config.grpo
    group_ids = np.asarray([row["extra"]["place"] for row in rows], np.int32)
    valid = np.asarray([not row["extra"]["masked"] for row in rows], bool)
    values = adv.advantages(
        [row["rewards"]["total"] for row in rows],
        group_ids,
        valid,
        scale=settings.advantage_scale,
        eps=settings.advantage_eps,
    )
    sequences = [
        make_sequence(
            prompts[group],
            np.asarray(row["token_ids"], np.int32),
            advantages=float(value),
            sampler_log_probs=np.asarray(row["logprobs"], np.float32),
            temperature=settings.sampling.temperature,
        )
        for row, group, value in zip(rows, group_ids, values, strict=True)
    ]
    lengths = np.asarray([len(row["token_ids"]) for row in rows], np.int32)
    gated = np.asarray([row["extra"]["gated"] for row in rows], bool)
    return GroupBatch(rows, sequences, group_ids, values, lengths, valid, gated)


def update(
    trainer: training.Trainer, state: Any, batch: GroupBatch, config: Any, step: int, reference: Any
) -> tuple[Any, dict[str, float]]:
    """`updates` optimiser steps, each on its own groups, `inner_epochs` times over.

    A completion of advantage 0 has no gradient without a KL term, so it is left out of the forward passes; its
    tokens stay in the denominators.
    """
    settings = config.grpo
    teaches = batch.valid & ((batch.advantages != 0) | bool(settings.kl_beta))
    sequences = dict(zip(np.flatnonzero(teaches).tolist(), _taught(batch, teaches), strict=True))
    if (
        settings.updates * settings.inner_epochs > 1
    ):  # law 2: pi_old is the trainer's own, before the first update
        sequences = _with_log_probs(trainer, sequences, state.model, "old_log_probs")
    if reference is not None:
        sequences = _with_log_probs(trainer, sequences, reference, "reference_log_probs")
    groups = np.unique(batch.group_ids)
    collected: list[dict[str, jax.Array]] = []
    for epoch in range(settings.inner_epochs):
        order = epoch_order(len(groups), config.seed, step * settings.inner_epochs + epoch)
        for members in np.array_split(groups[order], settings.updates):
            mask = np.isin(batch.group_ids, members)
            weights = np.zeros(len(mask))
            weights[mask] = adv.token_weights(
                settings.denominator,
                batch.lengths[mask],
                batch.group_ids[mask],
                batch.valid[mask],
                max_length=settings.sampling.max_tokens,
            )
            weighted = [
                dataclasses.replace(
                    sequence, weights=(sequence.weights * weights[index]).astype(np.float32)
                )
                for index, sequence in sequences.items()
                if mask[index]
            ]
            if weighted:  # a model that solves all it is asked, or nothing, is taught nothing
                state, metrics = trainer.step(state, weighted)
                collected.append(metrics)
    return state, grpo_metrics.mean_metrics(collected)


def _taught(batch: GroupBatch, teaches: np.ndarray) -> list[Sequence]:
    return [sequence for sequence, keep in zip(batch.sequences, teaches, strict=True) if keep]


def _with_log_probs(
    trainer: training.Trainer, sequences: dict[int, Sequence], model: Any, field: str
) -> dict[int, Sequence]:
    found = trainer.with_log_probs(list(sequences.values()), model, field)
    return dict(zip(sequences, found, strict=True))
