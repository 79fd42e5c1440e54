"""Asynchronous against lock-step search, under a virtual clock and in real time.

    python benchmarks/scheduling.py                                   # made-up trees, lognormal durations
    python benchmarks/scheduling.py --recorded=EVOLVE/round_2/search  # trees of a run of configs/evolve.py:tiny
    python benchmarks/scheduling.py --real=EVOLVE/round_1/sft         # engine and sandbox themselves, 64 problems
    python benchmarks/scheduling.py --host                            # host time a decode call, 64 to 2,000 in flight

Both schedules run the same tree code over the same driver, engine and sandbox, with the same keyed draws; that the
trees are equal is checked. Lock-step is the order of the public rStar-Math code: all problems wait for each other's
steps, then for each other's programs, then for the scores, and at the end of a rollout for each other's rollouts. In
its favour, a problem whose rollout starts deep in its tree is there at once (the public code walks down one level a
round), and all that waits fills the slots, first come first served, as it does in the asynchronous schedule.
"""

import argparse
import asyncio
import collections
import dataclasses
import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax  # noqa: E402
from etils import epath  # noqa: E402

import configs.search  # noqa: E402
from benchmarks.sandbox import family_cpu  # noqa: E402
from benchmarks.virtual_time import (  # noqa: E402
    Costs,
    Program,
    Replay,
    Shape,
    World,
    lognormal,
    made_trees,
    make_world,
    prompt_of,
    replay,
    run_virtual,
)
from smallmath_jax.records import Problem, Prompt, Tree  # noqa: E402
from smallmath_jax.rollout import programs  # noqa: E402
from smallmath_jax.rollout.engine import Engine  # noqa: E402
from smallmath_jax.search import mcts  # noqa: E402
from smallmath_jax.search.expand import Search, finish, open_search  # noqa: E402
from smallmath_jax.search.settings import SearchSettings  # noqa: E402
from smallmath_jax.tasks.driver import Driver, Meter, open_host  # noqa: E402
from smallmath_jax.tasks.policy import load_policy, make_mesh, prompts_for  # noqa: E402
from smallmath_jax.tasks.rollouts import make_engine  # noqa: E402
from smallmath_jax.tasks.search import drawing, problems_in_flight  # noqa: E402
from smallmath_jax.tasks.sources import training_problems  # noqa: E402
from smallmath_jax.tasks.tree_parts import read_trees  # noqa: E402
from smallmath_jax.verify.sandbox import SandboxSettings, start_sandbox  # noqa: E402

Asked = list[tuple[Problem, Prompt]]


# ---- the two schedules


async def asynchronous(
    driver: Driver, asked: Asked, settings: SearchSettings, in_flight: int
) -> list[Tree]:
    """As tasks.search: every problem waits for its own calls alone."""
    trees: dict[str, Tree] = {}

    async def grow(problem: Problem, prompt: Prompt) -> Tree:
        root = driver.open(prompt)
        try:
            callables = driver.callables(problem, settings)
            return await mcts.search(problem, root, settings=settings, **callables)
        finally:
            driver.close(root)

    jobs = (functools.partial(grow, *one) for one in asked)
    await driver.run(jobs, in_flight, lambda tree: trees.__setitem__(tree.problem_id, tree))
    return [trees[problem.id] for problem, _ in asked]


async def lock_step(driver: Driver, asked: Asked, settings: SearchSettings) -> list[Tree]:
    """As the public code: one kind of call at a time, of all problems, and a wait at the end of every rollout."""
    waiting: dict[str, list[tuple[Callable[[], Awaitable], asyncio.Future]]] = {
        name: [] for name in ("generate", "run_code", "score", "rollout")
    }
    changed = asyncio.Event()

    def held(name: str, call: Callable) -> Callable:
        async def ask(*arguments: Any) -> Any:
            done = asyncio.get_running_loop().create_future()
            waiting[name].append((functools.partial(call, *arguments), done))
            changed.set()
            return await done

        return ask

    async def rollouts(run: Search) -> str:
        while not (reason := mcts.ended(run)):
            await mcts.rollout(run)
            await held("rollout", lambda: None)()
        return reason

    async def grow(problem: Problem, prompt: Prompt) -> Tree:
        root = driver.open(prompt)
        callables = driver.callables(problem, settings)
        for name in ("generate", "run_code", "score"):
            callables[name] = callables[name] and held(name, callables[name])
        run = open_search(problem, root, settings, None, callables)
        tree = await finish(run, rollouts(run))
        driver.close(root)
        return tree

    async def settled() -> None:
        while sum(map(len, waiting.values())) < sum(not task.done() for task in tasks):
            await changed.wait()
            changed.clear()

    async def answer(name: str) -> None:
        calls, waiting[name] = waiting[name], []
        results: dict[int, Any] = {}

        async def one(number: int, call: Callable[[], Awaitable]) -> tuple[int, Any]:
            return number, await call()

        jobs = (functools.partial(one, number, call) for number, (call, _) in enumerate(calls))
        await driver.run(jobs, max(len(calls), 1), lambda pair: results.__setitem__(*pair))
        for number, (_, done) in enumerate(calls):
            done.set_result(results[number])
        await settled()

    tasks = [asyncio.create_task(grow(*one)) for one in asked]
    for task in tasks:
        task.add_done_callback(lambda _: changed.set())
    await settled()
    while not all(task.done() for task in tasks):
        while waiting["generate"]:
            for name in ("generate", "run_code", "score"):
                await answer(name)
        ended, waiting["rollout"] = waiting["rollout"], []
        for _, done in ended:
            done.set_result(None)
        await settled()
    return [task.result() for task in tasks]


# ---- under the virtual clock


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Measures of both schedules (World.measures), and the trees, which are the same."""

    asynchronous: dict[str, float]
    lock_step: dict[str, float]
    trees: list[Tree]

    @property
    def ratio(self) -> float:
        return self.lock_step["seconds"] / self.asynchronous["seconds"]


def compare(
    recorded: Replay,
    settings: SearchSettings,
    shape: Shape,
    costs: Costs,
    seconds: Callable[[Program], float],
    in_flight: int = 0,
) -> Outcome:
    """Runs both schedules, each in a world of its own. `in_flight` 0: as tasks.search. Raises AssertionError where
    they give other trees."""
    asked = [(problem, prompt_of(problem)) for problem in recorded.problems]
    worlds: list[World] = [make_world(recorded, shape, costs, seconds) for _ in range(2)]
    first, second = worlds
    in_flight = in_flight or problems_in_flight(first.driver.engine, settings)
    trees = run_virtual(first.clock, lambda: asynchronous(first.driver, asked, settings, in_flight))
    same = run_virtual(second.clock, lambda: lock_step(second.driver, asked, settings))
    failed = [tree.extra["failure"] for tree in trees if tree.stopped == "failed"]
    assert not failed, failed[0]
    assert trees == same, "the two schedules gave different trees"
    return Outcome(first.measures(), second.measures(), trees)


def same_shapes(trees: Sequence[Tree], stored: Sequence[Tree]) -> bool:
    """Whether a replay gave the stored trees: nodes, visits and walks."""
    outline = lambda tree: (
        [(node.tag, node.kind, node.visit_count, node.answer) for node in tree.nodes],
        tree.extra["walks"],
        tree.stopped,
    )
    return [*map(outline, trees)] == [*map(outline, stored)]


# ---- trees to replay


def settings_of(trees: Sequence[Tree]) -> SearchSettings:
    """What stored trees were searched with. Raises ValueError where they differ."""
    found = {tuple(sorted(tree.extra["settings"].items())) for tree in trees}
    if len(found) != 1:
        raise ValueError(f"the trees come from {len(found)} different searches; give one search's")
    return SearchSettings(**dict(found.pop()))


def timed(programs: Sequence[Program]) -> dict[Program, float]:
    """CPU seconds of each program in the real sandbox: its own, and its share of what the sandbox spends beside it."""
    with start_sandbox(SandboxSettings(workers=1, modules=(), memo_entries=0)) as sandbox:
        sandbox.run_many(programs[:20])
        before = family_cpu(sandbox._process.pid)
        results = sandbox.run_many(programs)
        whole = family_cpu(sandbox._process.pid) - before
    own = [result.cpu_ms / 1000 for result in results]
    overhead = max(whole - sum(own), 0.0) / len(programs)
    return {asked: one + overhead for asked, one in zip(programs, own, strict=True)}


# ---- in real time


class Stopwatch:
    """Calls compiled programs like `rollout.pool.Programs`, waits for each, and keeps the milliseconds of the calls."""

    def __init__(self, inner: Any):
        self._inner, self.calls = inner, collections.defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, called: Callable, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = jax.block_until_ready(self._inner.run(called, *arguments))
        spent = 1000 * (time.perf_counter() - started)
        steps = int(result[1].steps) if called is programs.decode else 1
        self.calls[called.__name__].append(spent / steps)
        return result


def watch(engine: Engine) -> Stopwatch:
    """Puts a stopwatch under a real engine."""
    engine._programs = Stopwatch(engine._programs)
    engine._pool._run = engine._programs.run
    return engine._programs


def real(workdir: str, count: int, settings: SearchSettings) -> dict[str, dict[str, float]]:
    """Both schedules on the tiny policy of a run, its engine and a sandbox, in turn; what the engine's calls cost."""
    config = configs.search.get_config("tiny")
    config.init_from, config.sandbox.modules = workdir, ()
    config.sandbox.memo_entries = 0  # else the second schedule would find what the first one ran
    policy = load_policy(config, make_mesh(config))
    problems = training_problems(config.problems, count, config, epath.Path(workdir))
    kept, prompts, _ = prompts_for(problems, policy, config)
    asked, engine = list(zip(kept, prompts, strict=True)), make_engine(policy, config)
    in_flight = problems_in_flight(engine, settings)
    found, trees = {}, []
    with open_host(config.sandbox.to_dict()) as host:
        for name in (
            "warm up",
            "asynchronous",
            "lock-step",
            "asynchronous again",
            "lock-step again",
        ):
            driver = Driver(policy, engine, host, **drawing(config))
            if name.startswith("lock"):
                body = lock_step(driver, asked, settings)
            else:
                body = asynchronous(driver, asked, settings, in_flight)
            meter, wall, cpu = Meter(engine), time.monotonic(), family_cpu(os.getpid())
            trees.append(asyncio.run(body))
            wall, cpu = time.monotonic() - wall, family_cpu(os.getpid()) - cpu
            found[name] = meter.read() | {"seconds": wall, "cpu_seconds": cpu}
        assert all(one == trees[1] for one in trees), "the schedules gave different trees"
        stopwatch = watch(engine)
        asyncio.run(
            asynchronous(
                Driver(policy, engine, host, **drawing(config)), asked, settings, in_flight
            )
        )
    # The machine may be busy: the lowest tenth tells what a call costs by itself
    lowest = lambda calls: statistics.quantiles(calls, n=10)[0]
    found["milliseconds a call"] = {name: lowest(one) for name, one in stopwatch.calls.items()}
    return found


# ---- thousands in flight


HOST_SEARCH = {"rollouts": 1, "candidates": 4}


def host_time(recorded: Replay, in_flight: int) -> dict[str, float]:
    """CPU milliseconds of searches, driver and engine, without its programs, while so many problems are in flight."""
    settings = SearchSettings(**HOST_SEARCH)
    world = make_world(
        recorded, Shape(slots=64, cache_length=512, workers=64), Costs(), lambda _: 0.02
    )
    asked = [(problem, prompt_of(problem)) for problem in recorded.problems]
    spent = [0.0]
    inner = world.clockwork.run

    def run(*arguments: Any) -> Any:
        started = time.process_time()
        result = inner(*arguments)
        spent[0] += time.process_time() - started
        return result

    world.driver.engine._programs.run = world.driver.engine._pool._run = run
    started = time.process_time()
    run_virtual(world.clock, lambda: asynchronous(world.driver, asked, settings, in_flight))
    milliseconds = 1000 * (time.process_time() - started - spent[0])
    counts = world.driver.engine.counters()
    return {
        "a decode call": milliseconds / counts["decode_calls"],
        "a step of reasoning": milliseconds / len(recorded.draws),
        "decode calls": counts["decode_calls"],
    }


# ---- tables


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    recorded: Replay
    settings: SearchSettings
    shape: Shape
    costs: Costs
    seconds: Callable[[Program], float]


# Round 2 of a run of configs/evolve.py:tiny on two cores: decode_seconds over decode_steps, prefill_seconds
# over prefill calls; filling slots takes next to nothing (--real)
TINY_COSTS = Costs(decode=7.7, prefill=2.0, fill=0.04)
# configs/evolve.py:math7b's engine but for its slots; a guess at its times, of which only the proportions count
LARGE = Shape(cache_length=4096, prefill_chunk=128, decode_steps=32, pages=1024, max_tokens=1024)
LARGE_COSTS = Costs(decode=20.0, prefill=40.0, fill=1.0)


def recorded_cases(stored: Sequence[Tree]) -> list[Case]:
    """Trees of a search of configs/evolve.py:tiny as they were, their programs timed in the sandbox."""
    settings, found = settings_of(stored), replay(stored)
    times = timed(list(found.results))
    middle = 1000 * statistics.median(times.values())
    print(f"{len(stored)} trees, {len(times)} programs of {middle:.1f} CPU-ms (median)", flush=True)
    return [
        Case("recorded", found, settings, shape, TINY_COSTS, times.__getitem__)
        for shape in (
            Shape(slots=128, workers=2),
            Shape(slots=128, workers=32),
            Shape(slots=512, workers=32),
        )
    ]


def lognormal_cases(trees: Sequence[Tree]) -> list[Case]:
    """The same trees with lognormal durations, sigma 1: steps of 40 tokens, programs of 50 or 200 ms (medians)."""
    found = replay(trees, _lengths(40.0, LARGE.max_tokens))
    return [
        Case(
            f"lognormal, programs {milliseconds} ms",
            found,
            settings_of(trees),
            dataclasses.replace(LARGE, slots=slots, workers=workers),
            LARGE_COSTS,
            lognormal(milliseconds / 1000, 1.0, 5.0),
        )
        for slots, workers, milliseconds in (
            (64, 16, 50),
            (256, 16, 50),
            (256, 16, 200),
            (1024, 64, 50),
        )
    ]


def _lengths(median: float, most: int) -> Callable[[Any], int]:
    draw = lognormal(median, 1.0, most)
    return lambda key: round(draw(key.tobytes()))


def line(case: Case, in_flight: int) -> str:
    found = compare(case.recorded, case.settings, case.shape, case.costs, case.seconds, in_flight)
    pair = (found.asynchronous, found.lock_step)
    cells = [case.name, str(case.shape.slots), str(case.shape.workers)]
    cells += [f"{one['seconds']:.0f}" for one in pair] + [f"{found.ratio:.2f}"]
    for name in ("occupancy", "occupancy_of_all", "device", "workers"):
        cells.append(", ".join(f"{one[name]:.0%}" for one in pair))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recorded", default="")
    parser.add_argument("--real", default="")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--in_flight", type=int, default=0)  # 0: as tasks.search
    options = parser.parse_args()
    if options.host:
        recorded = replay(made_trees(2000, SearchSettings(**HOST_SEARCH)))
        for in_flight in (64, 500, 2000):
            found = host_time(recorded, in_flight)
            cells = [f"{name} {value:.2f}" for name, value in found.items()]
            print(f"{in_flight} in flight, ms: {', '.join(cells)}", flush=True)
        return
    if options.real:
        settings = SearchSettings(rollouts=16, candidates=6, max_depth=12, round=2)
        for name, values in real(options.real, min(options.problems, 64), settings).items():
            print(name, {key: round(value, 3) for key, value in values.items()}, flush=True)
        return
    if options.recorded:
        stored = read_trees([epath.Path(options.recorded) / "trees"])[: options.problems]
        cases = recorded_cases(stored) + lognormal_cases(stored)
    else:
        settings = SearchSettings(rollouts=16, candidates=8)
        cases = lognormal_cases(made_trees(options.problems, settings))
    heads = "durations|slots|workers|asynchronous s|lock-step s|ratio|slots busy while decoding"
    heads += "|slots busy, of all time|device busy|workers busy"
    print("| " + heads.replace("|", " | ") + " |\n" + "|---" * 10 + "|", flush=True)
    for case in cases:
        print(line(case, options.in_flight), flush=True)


if __name__ == "__main__":
    main()
