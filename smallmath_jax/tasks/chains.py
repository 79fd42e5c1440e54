"""Whole trajectories without search: the program in one go, its output from the sandbox, then the answer.

For pass@1, votes and best-of-N. One request for a program costs a tenth of the calls of its steps one by one.
"""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import Completion, Problem, Prompt, Sampling, draw_key, read_parts
from smallmath_jax.rollout.engine import Limits
from smallmath_jax.search import steps
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.tree import LiveNode
from smallmath_jax.tasks.completions import image_links
from smallmath_jax.tasks.driver import Driver, Meter, Place
from smallmath_jax.tasks.policy import with_pixels
from smallmath_jax.tasks.tree_parts import Parts
from smallmath_jax.train.loop import Progress, StopSignal, StopTogether

BLOCKS = 32  # draws a trajectory may take: a program each, or a step each in the text form
GREEDY, SAMPLED = "greedy", "sampled"


@dataclasses.dataclass(frozen=True)
class Chain:
    """A trajectory as it grew."""

    text: str
    token_ids: list[int]
    written: int  # tokens of the policy
    log_prob: float  # of them
    place: Place
    answer: str | None
    status: str  # of its last program
    stop_reason: str


async def follow(
    driver: Driver,
    root: Place,
    names: Sequence[Any],
    sampling: Sampling,
    max_tokens: int,
    settings: SearchSettings,
) -> Chain:
    """One trajectory of at most `max_tokens` written tokens from a root; `names` name its draws (law 5).

    A program's output is shown as a search by `settings` shows it.
    """
    chain = Chain("", [], 0, 0.0, root, None, "", "length")
    for block in range(BLOCKS):
        if chain.written >= max_tokens:
            return chain
        key = draw_key(*names, block)[None]
        limits = Limits(max_tokens - chain.written, _stops(driver))
        drawn = await driver.generate(chain.place, 1, key, limits, sampling)
        if not drawn:
            return chain
        chain = _longer(driver, chain, drawn[0])
        if steps.ending(drawn[0].text) == steps.STEP_END and drawn[0].stop_reason != "eos":
            continue
        if steps.ending(drawn[0].text) != steps.CODE_END:
            step = steps.read_step(drawn[0])
            return dataclasses.replace(chain, answer=step.answer)
        (result,) = await driver.run_code([("", program_of(chain.text))])
        output = steps.shown_output(LiveNode(), result, settings)
        ids = driver.encode(output)
        chain = dataclasses.replace(
            chain,
            text=chain.text + output,
            token_ids=chain.token_ids + ids,
            place=driver.append(chain.place, ids),
            status=result.status,
        )
    return chain


def _stops(driver: Driver) -> tuple[tuple[int, ...], ...]:
    """What ends a program or an answer; a step's end stops nothing here. In the text form all stops do."""
    ids = driver.policy.tokens.step_ids
    stops = tuple((ids[mark],) for mark in (steps.CODE_END, steps.ANSWER_END) if mark in ids)
    return stops or driver.limits.stop


def _longer(driver: Driver, chain: Chain, candidate: steps.Candidate) -> Chain:
    ids = list(candidate.token_ids)
    return dataclasses.replace(
        chain,
        text=chain.text + candidate.text,
        token_ids=chain.token_ids + ids,
        written=chain.written + len(ids),
        log_prob=chain.log_prob + candidate.log_prob,
        place=driver.append(chain.place, ids),
        stop_reason=candidate.stop_reason,
    )


def program_of(text: str) -> str:
    """The Python of the last code block of a trajectory, step marks left out."""
    return text.rpartition(steps.CODE)[2].replace(steps.STEP_END, "").split(steps.CODE_END)[0]


def sample_all(
    driver: Driver,
    pairs: Sequence[tuple[Problem, Prompt]],
    folder: epath.Path,
    *,
    samples: int,
    sampling: Sampling,
    settings: SearchSettings,
    seed: int,
    stop: StopSignal,
    max_tokens: int,
    watchdog_s: float,
    title: str,
    greedy: bool = True,
) -> int:
    """A greedy and `samples` sampled trajectories of every problem, graded, scored where there is a judge.

    They go into parts of `folder`, one row of completions each; problems that are there are not done again. Returns 0
    when all hosts are done, and the exit code to leave with when `stop` asked one of them to.
    """
    done = {row["problem_id"] for row in read_parts(folder)}
    mine = [pair for pair in hosts.share(list(pairs)) if pair[0].id not in done]
    asked = [(GREEDY, 0, Sampling(temperature=0.0))] if greedy else []
    asked += [(SAMPLED, n, sampling) for n in range(samples)]
    drawn = lambda root, names, how: follow(driver, root, names, how, max_tokens, settings)
    jobs = (_job(driver, problem, prompt, asked, seed, drawn) for problem, prompt in mine)
    in_flight = max(1, 2 * driver.engine.slots // max(len(asked), 1)) + 1
    bar = Progress(max(len(mine), 1), title, quiet=not mine or hosts.host_index() != 0)
    together, meter = StopTogether(stop), Meter(driver.engine)
    counts = {"right": 0, "rows": 0}
    with hosts.watchdog(watchdog_s):
        with Parts(folder) as writer:

            def finished(rows: list[Completion]) -> None:
                writer.add(*rows)
                counts["rows"] += len(rows)
                counts["right"] += sum(row.verdict == "correct" for row in rows)
                right = f"{counts['right'] / counts['rows']:.1%}"
                bar.advance(1, right=right, **meter.shown())

            def leave() -> bool:
                writer.tick()
                return together.asked()

            whole = asyncio.run(driver.run(jobs, in_flight, finished, leave))
        bar.close()
        return together.finish(whole)


def _job(
    driver: Driver,
    problem: Problem,
    prompt: Prompt,
    asked: Sequence[tuple[str, int, Sampling]],
    seed: int,
    drawn: Callable[..., Awaitable[Chain]],
) -> Callable[[], Any]:
    async def chains() -> list[Completion]:
        root = driver.open(with_pixels(prompt, problem, driver.policy))
        try:
            names = lambda how, n: (seed, "chain", problem.id, how, n)
            found = await asyncio.gather(
                *(drawn(root, names(how, n), one) for how, n, one in asked)
            )
            scores = await _scores(driver, found)
            rows = []
            for (how, n, _), chain, score in zip(asked, found, scores, strict=True):
                rows.append(await _row(driver, problem, prompt, chain, how, n, score))
            return rows
        finally:
            driver.close(root)

    return chains


async def _scores(driver: Driver, chains: Sequence[Chain]) -> list[float | None]:
    """The preference model's score of each answered trajectory; None where there is none."""
    scores: list[float | None] = [None] * len(chains)
    answered = [index for index, chain in enumerate(chains) if chain.answer is not None]
    if driver.judge is not None and answered:
        found = await driver.score([chains[index].place for index in answered])
        for index, score in zip(answered, found, strict=True):
            scores[index] = score
    return scores


async def _row(
    driver: Driver,
    problem: Problem,
    prompt: Prompt,
    chain: Chain,
    how: str,
    sample: int,
    score: float | None,
) -> Completion:
    verdict = "no_answer"
    if chain.answer is not None:
        verdict = await driver.grade(problem, chain.answer)
    return Completion(
        problem_id=problem.id,
        sample=sample,
        prompt=prompt.text,
        text=chain.text,
        token_ids=[int(token) for token in np.asarray(chain.token_ids)],
        logprobs=[],
        stop_reason=chain.stop_reason,
        answer=chain.answer,
        gold=problem.answer,
        verdict=verdict,
        policy_version=driver.engine.version,
        level=problem.level,
        subject=problem.subject,
        template=problem.template,
        images=image_links(problem.images, sample),
        extra={
            "decoding": how,
            "set": problem.meta.get("set", problem.source),
            "score": score,
            "log_prob": chain.log_prob,
            "written": chain.written,
            "status": chain.status,
        },
    )
