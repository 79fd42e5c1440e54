"""Tree search over many problems (rStar-Math, section 3.2): trees in immutable parts, one loop for all of them.

WORKDIR/trees/NUMBER-hostH.jsonl hold the finished trees, WORKDIR/report/trees shows them. Killed at any moment and
started again, problems whose trees are there are not searched again, and the others give the trees they would have
given (law 6); a tree does not depend on what else was searched beside it (law 5). A search that failed is tried again.
"""

import asyncio
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from smallmath_jax.models.lora import merge_lora
from smallmath_jax.models.value_head import add_value_head
from smallmath_jax.parallel import hosts
from smallmath_jax.records import Problem, Prompt, Tree, to_json, write_text
from smallmath_jax.report.trees import write_tree_index
from smallmath_jax.rollout.engine import Engine
from smallmath_jax.search import select
from smallmath_jax.search.mcts import search, search_seeds
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.vote import Scale, scale_of
from smallmath_jax.tasks import identity, runs
from smallmath_jax.tasks.completions import image_link
from smallmath_jax.tasks.driver import Driver, Judge, Meter, open_host
from smallmath_jax.tasks.policy import (
    Policy,
    add_lora,
    judge_checkpoints,
    load_policy,
    make_mesh,
    prompts_for,
    restore_model,
    run_config,
    with_pixels,
)
from smallmath_jax.tasks.rollouts import make_engine, sampling_of
from smallmath_jax.tasks.sources import training_problems
from smallmath_jax.tasks.tree_parts import FAILED, Parts, by_problem, find_trees, iter_trees
from smallmath_jax.train.loop import Progress, StopSignal, StopTogether


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
        driver = Driver(policy, engine, host, judge=judge, **drawing(config))
        settings = search_settings(config.search, seed=config.seed)
        identity.keep_or_refuse(this_run.workdir, weights_of(driver, config))
        grow_trees(driver, problems, settings, folder, config, stop=stop, searches=config.searches)
        if hosts.host_index() == 0:
            record = finish(folder, this_run.workdir)
            again = "; the same command tries them again" if record["failed"] else ""
            runs.say(
                f"done in {this_run.wall_s():.0f} s: {record['coverage']:.1%} of {record['problems']} problems have a "
                f"right answer, {record['failed']} searches failed{again}; {workdir}/report/trees/index.html"
            )


def weights_of(driver: Driver, config: Any) -> dict[str, Any]:
    """What draws and what judges, by digests of the weights."""
    judge = driver.judge
    return {
        "source": identity.source_of(config),
        "weights": driver.engine.weights_digest(),
        "judge": None if judge is None else judge.engine.weights_digest(),
    }


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
    """The preference model that a run of configs/ppm.py, or the last finished round of configs/evolve.py, left.

    It must read the policy's tokens. Raises FileNotFoundError or ValueError for a workdir without one.
    """
    settings = ConfigDict(run_config(workdir))
    model = add_lora(policy.model, settings, mesh) if settings.lora.rank else policy.model
    like = add_value_head(model, jax.random.key(0))
    try:
        model = merge_lora(restore_model(judge_checkpoints(workdir), like, mesh))
    except ValueError as error:
        if "value_head" not in str(error):
            raise
        raise ValueError(
            f"judge={workdir}: a policy, and no preference model; give the workdir of configs/ppm.py or of "
            "configs/evolve.py itself"
        ) from error
    scale = scale_of(settings.ppm.loss, settings.ppm.tanh_in_loss)
    return make_judge(dataclasses.replace(policy, model=model), config, scale)


def make_judge(model: Policy, config: Any, scale: Scale) -> Judge:
    """An engine that only scores: few slots, as many pages as the policy's has."""
    pages = config.engine.pages or config.engine.slots * (
        -(-config.engine.cache_length // config.engine.prefill_chunk) // 2
    )
    return Judge(make_engine(model, config, slots=8, pages=pages), scale)


def grow_trees(
    driver: Driver,
    problems: Sequence[Problem],
    settings: SearchSettings,
    folder: epath.Path,
    config: Any,
    *,
    stop: StopSignal,
    searches: int = 1,
    earlier: Callable[[str, int], Tree | None] = lambda problem_id, seed: None,
    walk: Callable[..., Any] = search,
    title: str = "search",
) -> dict[str, float]:
    """Searches every problem `searches` times, with as many seeds, into parts of `folder`; what is there is not redone.

    `earlier`: (problem id, seed) -> a tree that goes on (rollouts count from its first), or None. `walk`: how a problem
    is searched, `mcts.search` or one of `beam`. Each host searches its share, and all leave together: with the
    signal's exit code when `stop` asks any of them for it, all finished trees saved. Returns what the engine did
    (Meter.read); {} where nothing was left to search.
    """
    seeds = search_seeds(settings.seed, searches)
    done = {entry.key for entry in find_trees([folder]) if entry.stopped != FAILED}
    mine = hosts.share(list(problems))
    mine = [one for one in mine if any((one.id, seed) not in done for seed in seeds)]
    kept, prompts, left_out = prompts_for(mine, driver.policy, config)
    _say_left_out(left_out, title)
    asked = [
        (problem, prompt, dataclasses.replace(settings, seed=seed))
        for problem, prompt in zip(kept, prompts, strict=True)
        for seed in seeds
        if (problem.id, seed) not in done
    ]
    jobs = (
        search_job(driver, problem, prompt, one, earlier(problem.id, one.seed), walk)
        for problem, prompt, one in asked
    )
    together, meter = StopTogether(stop), Meter(driver.engine)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    quiet = not asked or hosts.host_index() != 0
    bar = Progress(max(len(asked), 1), title, quiet=quiet)
    with hosts.watchdog(config.watchdog_s):
        with Parts(folder) as parts:

            def finished(tree: Tree) -> None:
                parts.add(tree)
                counts.update(done=1, right=any(n.verdict == "correct" for n in tree.nodes))
                failures.extend([tree.extra["failure"]] if tree.stopped == FAILED else ())
                shown = meter.shown()
                if settings.use_gold:
                    shown = {"answered right": f"{counts['right'] / counts['done']:.1%}"} | shown
                bar.advance(1, **shown)

            def leave() -> bool:
                parts.tick()
                return together.asked()

            in_flight = config.in_flight or problems_in_flight(driver.engine, settings)
            whole = asyncio.run(driver.run(jobs, in_flight, finished, leave))
        bar.close()
        code = together.finish(whole)
    _say_failed(failures, title)
    if code:
        runs.say(f"{title}: stopped, finished trees are saved; the same command continues")
        sys.exit(code)
    return meter.read() if asked else {}


def _say_left_out(left_out: Mapping[str, int], title: str) -> None:
    """Problems without a prompt, of all hosts."""
    total = sum(map(Counter, hosts.gather(dict(left_out))), Counter())
    if total:
        runs.say(f"{title}: problems left out: {dict(total)}")


def _say_failed(failures: Sequence[str], title: str) -> None:
    """How many searches failed on all hosts, and one of the reasons."""
    told = [one for one in hosts.gather([len(failures), *failures[-1:]]) if one[0]]
    if told:
        count = sum(one[0] for one in told)
        runs.say(f"{title}: {count} searches failed, not the others; one with {told[0][1]}")


def problems_in_flight(engine: Engine, settings: SearchSettings) -> int:
    """Enough that slots stay full while most searches wait: for the last of their candidates, programs and scores.

    With lognormal steps, slots are 58 % busy at twice slots / candidates, 84 % at four times it, 86 % at eight times
    (docs/benchmarks.md).
    """
    return max(4 * engine.slots // settings.candidates, 1) + 1


def search_job(
    driver: Driver,
    problem: Problem,
    prompt: Prompt,
    settings: SearchSettings,
    tree: Tree | None = None,
    walk: Callable[..., Any] = search,
) -> Callable[[], Any]:
    """A job of Driver.run: one problem's search; goes on with `tree` where one is given."""

    async def grow() -> Tree:
        root = driver.open(with_pixels(prompt, problem, driver.policy))
        try:
            callables = driver.callables(problem, settings)
            before = {} if tree is None else {"tree": tree}
            grown = await walk(problem, root, settings=settings, **before, **callables)
        finally:
            driver.close(root)
        return described(grown, problem, driver)

    return grow


def described(tree: Tree, problem: Problem, driver: Driver) -> Tree:
    """The tree with what its record needs beside the search: pictures, options, sandbox tier, weights' version."""
    extra = {"sandbox_tier": driver.host.tier, "policy_version": driver.engine.version}
    extra |= {"origin": problem.origin} if problem.origin else {}
    extra |= {"licence": problem.licence} if problem.licence else {}
    if problem.options:
        extra["options"] = list(problem.options)
    images = tuple(image_link(image) for image in problem.images)
    return dataclasses.replace(tree, images=images, extra=tree.extra | extra)


def finish(folder: epath.Path, workdir: epath.Path) -> dict[str, Any]:
    """Writes the pages of all trees and summary.json, which it returns. Trees pass one at a time."""
    entries = find_trees([folder])
    record = select.summary(by_problem(iter_trees(entries)))
    write_tree_index(iter_trees(entries), workdir / "report" / "trees")
    write_text(workdir / "summary.json", json.dumps(json.loads(to_json(record)), indent=1))
    return record
