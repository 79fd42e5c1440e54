"""Tree search over many problems (rStar-Math, section 3.2): trees in immutable parts, one loop for all of them.

WORKDIR/trees/NUMBER-hostH.jsonl hold the finished trees, WORKDIR/report/trees shows them. Killed at any moment and
started again, problems whose trees are there are not searched again, and the others give the trees they would have
given (law 6); a tree does not depend on what else was searched beside it (law 5).
"""

import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from smallmath_jax.models.value_head import add_value_head
from smallmath_jax.parallel import hosts
from smallmath_jax.records import Problem, Prompt, Tree, read_parts, to_json, write_part, write_text
from smallmath_jax.report.trees import write_tree_index
from smallmath_jax.rollout.engine import Engine
from smallmath_jax.search import select
from smallmath_jax.search.mcts import search, search_seeds
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.tree import tree_from_json
from smallmath_jax.tasks import runs
from smallmath_jax.tasks.driver import Driver, Judge, Meter, open_host
from smallmath_jax.tasks.evaluate import image_link, sampling_of
from smallmath_jax.tasks.policy import (
    Policy,
    load_policy,
    make_mesh,
    newest_checkpoints,
    prompts_for,
    restore_model,
    run_config,
    with_pixels,
)
from smallmath_jax.tasks.rollouts import make_engine
from smallmath_jax.tasks.sources import training_problems
from smallmath_jax.train.loop import Progress, StopSignal

PART_TREES = 64  # trees a published part holds at most: what a kill can cost

# Value scales at inference: tanh(raw / 5) is the public code's for scores trained raw; an ORM's logit becomes
# 2 sigmoid - 1; a PQM, and a PPM trained through tanh, were squashed in training.
SQUASH = {"ppm": 5.0, "orm": 2.0, "pqm": 1.0}


def run(config: Any, workdir: str) -> None:
    """Searches all problems of the config and writes WORKDIR/trees, report/trees and summary.json."""
    with (
        open_host(config.sandbox.to_dict()) as host,
        runs.open_run(config, workdir) as this_run,
        StopSignal() as stop,
    ):
        mesh = make_mesh(config)
        problems = training_problems(config.problems, config.limit, config, this_run.workdir)
        policy = load_policy(config, mesh)
        judge = load_judge(config.judge, policy, config, mesh) if config.judge else None
        engine = make_engine(policy, config)
        folder = this_run.workdir / "trees"
        settings = search_settings(config.search, seed=config.seed)
        grow_trees(
            Driver(policy, engine, host, judge=judge, **drawing(config)),
            problems,
            settings,
            folder,
            config,
            stop=stop,
            searches=config.searches,
        )
        if hosts.host_index() == 0:
            record = finish(folder, this_run.workdir)
            runs.say(
                f"done in {this_run.wall_s():.0f} s: {record['coverage']:.1%} of {record['problems']} problems have a "
                f"right answer, {record['failed']} failed; {workdir}/report/trees/index.html"
            )


def search_settings(settings: Any, **changes: Any) -> SearchSettings:
    """SearchSettings of a config's fields of the same names."""
    return SearchSettings(**(settings.to_dict() | changes))


def drawing(config: Any) -> dict[str, Any]:
    """How a Driver draws steps, by `config.prompt` and `config.sampling`."""
    return {
        "grammar": config.prompt.grammar,
        "sampling": sampling_of(config.sampling),
        "max_tokens": config.sampling.max_tokens,
    }


def load_judge(workdir: str, policy: Policy, config: Any, mesh: jax.sharding.Mesh) -> Judge:
    """The preference model that a run of configs/ppm.py left in `workdir`; it must read the policy's tokens."""
    settings = run_config(workdir)
    like = add_value_head(policy.model, jax.random.key(0))
    model = restore_model(newest_checkpoints(workdir), like, mesh)
    squash = squash_of(settings["ppm"]["loss"], settings["ppm"]["tanh_in_loss"])
    return make_judge(dataclasses.replace(policy, model=model), config, squash)


def squash_of(loss: str, tanh_in_loss: bool) -> float:
    """What a raw value is divided by before the tanh of inference."""
    return 1.0 if tanh_in_loss else SQUASH[loss]


def make_judge(model: Policy, config: Any, squash: float) -> Judge:
    """An engine that only scores: few slots, as many pages as the policy's has."""
    pages = config.engine.pages or config.engine.slots * (
        -(-config.engine.cache_length // config.engine.prefill_chunk) // 2
    )
    return Judge(make_engine(model, config, slots=8, pages=pages), squash)


def grow_trees(
    driver: Driver,
    problems: Sequence[Problem],
    settings: SearchSettings,
    folder: epath.Path,
    config: Any,
    *,
    stop: StopSignal,
    searches: int = 1,
    earlier: Mapping[str, Tree] | None = None,
    title: str = "search",
) -> dict[str, float]:
    """Searches every problem `searches` times, with as many seeds, into parts of `folder`; what is there is not redone.

    `earlier`: problem id -> a tree of settings.seed that goes on (rollouts count from its first). Leaves with the
    signal's exit code when `stop` asks for it, all finished trees saved. Returns what the engine did (Meter.read); {}
    where nothing was left to search.
    """
    kept, prompts, left_out = prompts_for(list(problems), driver.policy, config)
    if left_out:
        runs.say(f"{title}: problems left out: {left_out}")
    seeds = search_seeds(settings.seed, searches)
    done = {(row["problem_id"], row["seed"]) for row in read_parts(folder)}
    asked = [
        (problem, prompt, dataclasses.replace(settings, seed=seed))
        for index, (problem, prompt) in enumerate(zip(kept, prompts, strict=True))
        for seed in seeds
        if index % hosts.host_count() == hosts.host_index() and (problem.id, seed) not in done
    ]
    if not asked:
        return {}
    before = earlier or {}
    goes_on = lambda problem, one: before.get(problem.id) if one.seed == settings.seed else None
    jobs = (
        _job(driver, problem, prompt, one, goes_on(problem, one)) for problem, prompt, one in asked
    )
    bar = Progress(len(asked), title, quiet=hosts.host_index() != 0)
    with Parts(folder) as parts:
        meter, counts = Meter(driver.engine), {"right": 0, "done": 0}

        def finished(tree: Tree) -> None:
            parts.add(tree)
            counts["done"] += 1
            counts["right"] += any(node.verdict == "correct" for node in tree.nodes)
            rates = meter.read()
            shown = {"occupancy": rates["occupancy"], "tok/s": rates["tokens_per_second"]}
            if settings.use_gold:
                shown = {"solved": f"{counts['right'] / counts['done']:.1%}"} | shown
            bar.advance(1, **shown)

        in_flight = config.in_flight or problems_in_flight(driver.engine, settings)
        whole = asyncio.run(driver.run(jobs, in_flight, finished, lambda: stop.requested))
    bar.close()
    if not whole:
        runs.say(f"{title}: stopped, finished trees are saved; the same command continues")
        sys.exit(stop.exit_code)
    hosts.barrier(f"trees {folder}")
    return meter.read()


def problems_in_flight(engine: Engine, settings: SearchSettings) -> int:
    """Enough that slots stay full while most searches wait: for the last of their candidates, programs and scores.

    With lognormal steps, slots are 58 % busy at twice slots / candidates, 84 % at four times it, 86 % at eight times
    (docs/benchmarks.md).
    """
    return max(4 * engine.slots // settings.candidates, 1) + 1


def _job(
    driver: Driver, problem: Problem, prompt: Prompt, settings: SearchSettings, tree: Tree | None
) -> Callable[[], Any]:
    async def grow() -> Tree:
        root = driver.open(with_pixels(prompt, problem, driver.policy))
        try:
            callables = driver.callables(problem, settings)
            grown = await search(problem, root, settings=settings, tree=tree, **callables)
        finally:
            driver.close(root)
        return described(grown, problem, driver)

    return grow


def described(tree: Tree, problem: Problem, driver: Driver) -> Tree:
    """The tree with what its record needs beside the search: pictures, options, sandbox tier, weights' version."""
    extra = {"sandbox_tier": driver.host.tier, "policy_version": driver.engine.version}
    if problem.options:
        extra["options"] = list(problem.options)
    images = tuple(image_link(image) for image in problem.images)
    return dataclasses.replace(tree, images=images, extra=tree.extra | extra)


class Parts:
    """Writes rows as parts NUMBER-hostH.jsonl, PART_TREES a part, the rest when it is left, by an error too."""

    def __init__(self, folder: epath.Path):
        self._folder, self._rows = epath.Path(folder), []
        mine = f"-host{hosts.host_index()}.jsonl"
        found = self._folder.glob(f"*{mine}") if self._folder.exists() else ()
        self._next = max((int(part.name.removesuffix(mine)) + 1 for part in found), default=0)

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: Any) -> None:
        self._publish()

    def add(self, *rows: Any) -> None:
        """Rows that stand in one part, for example those of one problem."""
        self._rows += rows
        if len(self._rows) >= PART_TREES:
            self._publish()

    def _publish(self) -> None:
        if self._rows:
            name = f"{self._next:05d}-host{hosts.host_index()}.jsonl"
            write_part(self._folder, name, self._rows)
            self._next, self._rows = self._next + 1, []


def read_trees(folders: Iterable[Any]) -> list[Tree]:
    """All trees of some folders of parts, by problem id and seed, whatever order they came in.

    Of a (problem, seed) the last one counts: a tree of further rollouts stands in for the one it went on from.
    """
    found: dict[tuple[str, int], Tree] = {}
    for folder in folders:
        for row in read_parts(folder):
            tree = tree_from_json(row)
            found[tree.problem_id, tree.seed] = tree
    return [found[key] for key in sorted(found)]


def finish(folder: epath.Path, workdir: epath.Path) -> dict[str, Any]:
    """Writes the pages of all trees and summary.json, which it returns."""
    trees = read_trees([folder])
    record = select.summary(trees)
    write_tree_index(trees, workdir / "report" / "trees")
    write_text(workdir / "summary.json", json.dumps(json.loads(to_json(record)), indent=1))
    return record
