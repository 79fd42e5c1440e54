"""New problems from seed problems, kept when enough solutions agree on an answer (rStar-Math, section 3.5).

A server writes a problem like the seed, then solves it `solutions` times with programs that run in our sandbox; the
answer that at least `agreeing` of them share becomes its label. WORKDIR/made/*.jsonl holds all attempts, problems.jsonl
those that were kept, with the source and licence of their seeds. A killed run goes on with the seeds that are left.
"""

import asyncio
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import Problem, Sampling, draw_key, read_parts, to_json, write_text
from smallmath_jax.search.select import agreed_answer
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.tasks import runs
from smallmath_jax.tasks.chains import follow
from smallmath_jax.tasks.driver import Driver, open_host, same_answer
from smallmath_jax.tasks.policy import load_policy, make_mesh, prompts_for
from smallmath_jax.tasks.server import Client, ServerEngine, ServerError, ServerGone, settings_of
from smallmath_jax.tasks.sources import training_problems
from smallmath_jax.tasks.tree_parts import Parts
from smallmath_jax.train.loop import Progress, StopSignal, StopTogether

REQUEST = """\
Here is a mathematics problem:

{problem}

Write one new problem in the same field that needs a different idea or other numbers, is about as hard, can be \
understood without the one above, and has a single short answer. Write nothing but the new problem.

New problem:
"""
END = "<end_of_problem>"


def run(config: Any, workdir: str) -> None:
    """Writes WORKDIR/problems.jsonl."""
    if not config.server.base_url:
        raise ValueError(
            "say which server writes the problems: --config.server.base_url=http://…/v1"
        )
    settings = settings_of(config.server)
    with (
        open_host(config.sandbox.to_dict()) as host,
        runs.open_run(config, workdir) as this_run,
        StopSignal() as stop,
    ):
        seeds = training_problems(config.problems, config.limit, config, this_run.workdir)
        seeds = [seed for seed in seeds if not seed.images]
        policy = load_policy(config, make_mesh(config))
        client = Client(settings)
        with ServerEngine(client, policy.tokens, (), config.engine.cache_length) as engine:
            driver = Driver(
                policy,
                engine,
                host,
                grammar=config.prompt.grammar,
                sampling=Sampling(temperature=config.server.temperature),
                max_tokens=config.sampling.max_tokens,
            )
            make_problems(driver, client, seeds, this_run.workdir / "made", config, stop)
        if hosts.host_index() == 0:
            kept, made = keep(this_run.workdir)
            runs.say(
                f"{kept} of {made} new problems kept (at least {config.agreeing} of {config.solutions} solutions "
                f"agree): {workdir}/problems.jsonl"
            )


def make_problems(
    driver: Driver,
    client: Client,
    seeds: Sequence[Problem],
    folder: epath.Path,
    config: Any,
    stop: StopSignal,
) -> None:
    """`config.each` new problems of every seed, into parts of `folder`."""
    done = {(row["seed_id"], row["number"]) for row in read_parts(folder)}
    asked = [
        (seed, number)
        for seed in hosts.share(list(seeds))
        for number in range(config.each)
        if (seed.id, number) not in done
    ]
    bar = Progress(max(len(asked), 1), "synthesis", quiet=not asked or hosts.host_index() != 0)
    counts, together = {"kept": 0}, StopTogether(stop)
    with hosts.watchdog(config.watchdog_s):
        with Parts(folder) as parts:

            def finished(row: dict[str, Any]) -> None:
                parts.add(row)
                counts["kept"] += row["answer"] is not None
                bar.advance(1, kept=counts["kept"])

            def leave() -> bool:
                parts.tick()
                return together.asked()

            jobs = (_job(driver, client, seed, number, config) for seed, number in asked)
            in_flight = max(1, driver.engine.slots // config.solutions) + 1
            whole = asyncio.run(driver.run(jobs, in_flight, finished, leave))
        bar.close()
        code = together.finish(whole)
    if code:
        runs.say("synthesis: stopped, what is finished is saved; the same command continues")
        sys.exit(code)


def _job(
    driver: Driver, client: Client, seed: Problem, number: int, config: Any
) -> Callable[[], Any]:
    async def make() -> dict[str, Any]:
        key = int(draw_key(config.seed, "synthesis", seed.id, number)[0]) & 0x7FFFFFFF
        text, _ = await asyncio.to_thread(
            client.complete,
            REQUEST.format(problem=seed.problem),
            max_tokens=config.problem_tokens,
            sampling=driver.sampling,
            seed=key,
            stop=(END,),
        )
        problem = new_problem(seed, text.partition(END)[0].strip())
        answers = await _answers(driver, problem, config) if problem.problem else []
        return {
            "problem": dataclasses.asdict(problem),
            "answers": answers,
            "answer": agreed_answer(answers, same_answer, config.agreeing),
        }

    async def row() -> dict[str, Any]:
        """A refused request costs its own problem; where no request can succeed, the run ends."""
        named = {"seed_id": seed.id, "number": number}
        try:
            return named | await make()
        except ServerGone:
            raise
        except ServerError as error:
            return named | {"problem": None, "answers": [], "answer": None, "refused": str(error)}

    return row


def new_problem(seed: Problem, text: str) -> Problem:
    """A problem without answer yet, its source and licence those of its seed."""
    digest = hashlib.sha256(f"{seed.id}\x1f{text}".encode()).hexdigest()[:16]
    return Problem(
        id=f"synthetic-{digest}",
        problem=text,
        answer="",
        level=seed.level,
        subject=seed.subject,
        source=f"synthetic from {seed.source}",
        licence=seed.licence,
        meta={"seed": seed.id},
    )


async def _answers(driver: Driver, problem: Problem, config: Any) -> list[str | None]:
    """What each of `solutions` attempts answers; None for one that gives no answer."""
    _, prompts, _ = prompts_for([problem], driver.policy, config)
    if not prompts:  # longer than a prompt may be
        return []
    driver.engine.know(problem)
    root = driver.open(prompts[0])
    try:
        names = lambda n: (config.seed, "agreement", problem.id, n)
        limit = config.solution_tokens
        walks = (
            follow(driver, root, names(n), driver.sampling, limit, SearchSettings())
            for n in range(config.solutions)
        )
        # All of them end before the root is given back, whichever was refused
        found = await asyncio.gather(*walks, return_exceptions=True)
        for refused in (one for one in found if isinstance(one, BaseException)):
            raise refused
        return [chain.answer for chain in found]
    finally:
        driver.close(root)


def keep(root: epath.Path) -> tuple[int, int]:
    """Writes problems.jsonl of the attempts with a label, each text once; returns (kept, made)."""
    rows = sorted(read_parts(root / "made"), key=lambda row: (row["seed_id"], row["number"]))
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["answer"] is not None:
            kept.setdefault(row["problem"]["problem"], row["problem"] | {"answer": row["answer"]})
    fields = ("id", "problem", "answer", "level", "subject", "source", "licence")
    lines = [json.dumps({name: one[name] for name in fields}) for one in kept.values()]
    write_text(root / "problems.jsonl", "".join(line + "\n" for line in lines))
    summary = {
        "made": len(rows),
        "kept": len(kept),
        "refused": sum("refused" in row for row in rows),
    }
    write_text(root / "summary.json", to_json(summary))
    return len(kept), len(rows)
