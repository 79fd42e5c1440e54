"""Evaluation: sample answers, grade them, keep every generation, and report by level and subject."""

import dataclasses
import functools
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath

from smallmath_jax.data.tokens import decode
from smallmath_jax.parallel import hosts
from smallmath_jax.records import (
    Completion,
    Problem,
    Prompt,
    Sampling,
    draw_key,
    read_parts,
    to_json,
    write_part,
    write_text,
)
from smallmath_jax.report import metrics, pages
from smallmath_jax.rollout.engine import Engine, Limits, Rollout
from smallmath_jax.tasks import identity, runs, searched
from smallmath_jax.tasks.checks import check
from smallmath_jax.tasks.completions import completion_row
from smallmath_jax.tasks.driver import open_host, same_answer
from smallmath_jax.tasks.policy import (
    Policy,
    load_policy,
    make_mesh,
    prompts_for,
    settle_grammar,
    with_pixels,
)
from smallmath_jax.tasks.rollouts import Request, make_engine, run_requests, sampling_of
from smallmath_jax.tasks.sources import load_sources
from smallmath_jax.train.loop import Progress, StopSignal, StopTogether
from smallmath_jax.verify.grader import Grader

PART_ROWS = 64  # problems a published part: what a killed evaluation can lose


def run(config: Any, workdir: str) -> None:
    """Evaluates one policy and writes WORKDIR/report."""
    plain = config.prompt.grammar == "auto"
    settle_grammar(config)
    if plain and config.prompt.grammar == "code_steps":
        raise ValueError(
            f"the policy of {config.init_from} writes code steps: take configs/evaluate.py:{config.mode}-steps"
        )
    check(config)
    if config.eval.method == "sample" and config.prompt.grammar != "code_steps":
        _run_plain(config, workdir)
        return
    with (
        open_host(config.sandbox.to_dict()) as host,
        runs.open_run(config, workdir) as this_run,
        StopSignal() as stop,
    ):
        problems = load_evaluation_problems(config)
        check_compared(config.compare)
        result = searched.evaluate(config, problems, this_run, host, stop)
        _tell(config, this_run, result)


def _tell(config: Any, this_run: runs.Run, result: dict[str, Any]) -> None:
    pages.write_report(this_run.workdir, compare=list(config.compare), wall_s=this_run.wall_s())
    runs.say(
        f"accuracy {result['accuracy']:.1%} of {result['n']} ({result['decoding']}); report: "
        f"{this_run.workdir}/report/index.html"
    )


def _run_plain(config: Any, workdir: str) -> None:
    """Whole answers in one go, nothing run."""
    with runs.open_run(config, workdir) as this_run:
        mesh = make_mesh(config)
        problems = load_evaluation_problems(config)
        check_compared(config.compare)
        source = identity.source_of(config)
        policy = load_policy(config, mesh)
        engine = make_engine(policy, config)
        with StopSignal() as stop:
            result = evaluate(
                policy, engine, problems, config, this_run.workdir, stop=stop, source=source
            )
        _tell(config, this_run, result)


def check_compared(workdirs: Iterable[str]) -> None:
    """Raises ValueError naming the first of `config.compare` that holds no finished evaluation."""
    for workdir in workdirs:
        if not pages.find_evaluations(epath.Path(workdir)):
            raise ValueError(
                f"config.compare: {workdir} has no finished evaluation (no result.json in it or in its eval/ folders); "
                "give the workdir of an evaluation or a training run that has run to its end"
            )


def load_evaluation_problems(config: Any) -> list[Problem]:
    """All problems of `config.eval.problems`, `limit` a source, ids unique across sources."""
    found = load_sources(config.eval.problems, config, "eval.problems", config.eval.limit)
    return [
        dataclasses.replace(p, source=p.source or name, meta={**p.meta, "set": name})
        for name, problems in found.items()
        for p in problems
    ]


def evaluate(
    policy: Policy,
    engine: Engine,
    problems: list[Problem],
    config: Any,
    folder: str | epath.Path,
    prefix: str | None = None,
    step: int = 0,
    stop: StopSignal | None = None,
    source: str = "",
) -> dict[str, Any]:
    """Samples and grades every problem once; continues where an earlier call on `folder` stopped.

    What another policy, or other prompts or settings, left in `folder` is dropped first; `source` tells people where
    this policy comes from.
    After a signal to `stop` all hosts leave with the signal's exit code, each once its part under way is on disk.

    Returns:
      report.metrics.summarise of all completions: accuracy, n, ci, by_level, by_subject, by_set, greedy, sampled.
    """
    folder = epath.Path(folder)
    host = hosts.host_index()
    kept, prompts, dropped = prompts_for(problems, policy, config, prefix)
    source = source or f"the policy of {folder}"
    identity.keep_or_drop(folder, identity.identity_of(engine, kept, prompts, config, source))
    done = {row["problem_id"] for row in read_parts(folder / "completions")}
    mine = [
        (problem, prompt)
        for index, (problem, prompt) in enumerate(zip(kept, prompts, strict=True))
        if index % hosts.host_count() == host and problem.id not in done
    ]
    title = (
        f"evaluate {folder.name}" if prefix is None else f"evaluate {folder.name} after {prefix!r}"
    )
    bar = Progress(len(mine), title, quiet=not mine or host != 0)
    correct = seen = tokens = evaluated = 0
    started, together = time.perf_counter(), StopTogether(stop)
    with Grader() as grader, hosts.watchdog(config.watchdog_s):
        for first in range(0, len(mine), PART_ROWS):
            chunk = mine[first : first + PART_ROWS]
            rows: list[Completion] = []
            for index, rollouts in run_requests(engine, _asked(chunk, policy, config)):
                rows += _grade(chunk, index, rollouts, policy, config, grader, step)
                tokens += sum(len(rollout.token_ids) for rollout in rollouts)
                together.asked()  # often, or the other hosts wait for this one
            rows.sort(key=lambda row: (row.problem_id, row.extra["decoding"], row.sample))
            correct += sum(row.verdict == "correct" for row in rows)
            seen, evaluated = seen + len(rows), evaluated + len(chunk)
            number = (
                len(list((folder / "completions").glob("*.jsonl")))
                if (folder / "completions").exists()
                else 0
            )
            write_part(folder / "completions", f"{step:08d}-{number:05d}-host{host}.jsonl", rows)
            rate = tokens / (time.perf_counter() - started)
            bar.advance(
                len(chunk), right_of_all_sets=f"{correct / max(seen, 1):.1%}", **{"tok/s": rate}
            )
            if together.asked():
                break
        bar.close()
        code = together.finish(done=evaluated == len(mine))
    if code:
        runs.say(f"{title}: stopped, what is done is kept; the same command continues")
        sys.exit(code)
    return _summary(folder, config, dropped)


def _summary(folder: epath.Path, config: Any, dropped: dict[str, int]) -> dict[str, Any]:
    rows = list(read_parts(folder / "completions"))
    if not rows:
        raise ValueError(
            f"{folder}: no problem could be evaluated; left out: {dropped or 'nothing'}"
        )
    result = metrics.summarise(
        rows, config.eval.headline, tuple(config.eval.k), functools.cache(same_answer)
    )
    result["left_out"] = dropped
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        runs.say(
            f"{folder.name}: {sum(dropped.values())} problems left out ({reasons}; config.prompt.max_tokens "
            f"{config.prompt.max_tokens}, config.vision.max_patches {config.vision.max_patches}): not in the accuracy"
        )
    if hosts.host_index() == 0:
        write_text(folder / "result.json", to_json(result))
    return result


def _asked(chunk: list[tuple[Problem, Prompt]], policy: Policy, config: Any) -> Iterator[Request]:
    for problem, prompt in chunk:
        yield from _requests((problem, with_pixels(prompt, problem, policy)), config)


def _requests(pair: tuple[Problem, Prompt], config: Any) -> list[Request]:
    """The greedy request and the sampled one, those that the config asks for."""
    problem, prompt = pair
    limits = Limits(max_tokens=config.eval.sampling.max_tokens)
    requests = []
    if config.eval.greedy:
        key = draw_key(config.seed, "evaluate", problem.id, "greedy")
        requests.append(Request(prompt, key[None], limits, Sampling(temperature=0.0)))
    if config.eval.samples:
        keys = [
            draw_key(config.seed, "evaluate", problem.id, n) for n in range(config.eval.samples)
        ]
        requests.append(Request(prompt, np.stack(keys), limits, sampling_of(config.eval.sampling)))
    return requests


def _grade(
    chunk: list[tuple[Problem, Prompt]],
    index: int,
    rollouts: list[Rollout],
    policy: Policy,
    config: Any,
    grader: Grader,
    step: int,
) -> list[Completion]:
    per_problem = int(config.eval.greedy) + int(config.eval.samples > 0)
    problem, prompt = chunk[index // per_problem]
    greedy = config.eval.greedy and index % per_problem == 0
    rows = []
    for sample, rollout in enumerate(rollouts):
        text = decode(policy.tokens, rollout.token_ids)
        strict = grader.grade(problem.accepted, text, mode="strict", prefix=prompt.prefix)
        extra = {
            "decoding": "greedy" if greedy else "sampled",
            "set": problem.meta.get("set", problem.source),
        }
        if config.eval.lenient:
            lenient = grader.grade(problem.accepted, text, mode="lenient", prefix=prompt.prefix)
            extra["lenient_verdict"] = lenient.verdict
        rows.append(
            completion_row(problem, prompt, rollout, sample, text, strict, step, extra=extra)
        )
    return rows
