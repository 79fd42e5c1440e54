"""Evaluation by trajectories of code steps: plain ones, step-by-step chains, tree searches, beams; many a problem.

WORKDIR/completions or WORKDIR/trees hold what was sampled or searched, in parts: killed and started again, what is
there is not done again (law 6). Trees are searched without their gold answers and graded afterwards.
"""

import asyncio
import functools
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import Problem, Tree, read_parts, to_json, write_text
from smallmath_jax.report import metrics
from smallmath_jax.report.trees import write_tree_index
from smallmath_jax.search.beam import beam_search, sample_chains
from smallmath_jax.search.mcts import search, search_seeds
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.vote import Scale
from smallmath_jax.tasks import ballots, chains, identity, runs
from smallmath_jax.tasks import evolve_measures as measures
from smallmath_jax.tasks.ballots import Case, grouped_shares, mean
from smallmath_jax.tasks.driver import Driver, Host
from smallmath_jax.tasks.evolve_checks import count_failed
from smallmath_jax.tasks.policy import load_policy, make_mesh, prompts_for
from smallmath_jax.tasks.rollouts import make_engine, sampling_of
from smallmath_jax.tasks.runs import Run
from smallmath_jax.tasks.search import drawing, grow_trees, load_judge, search_settings
from smallmath_jax.tasks.tree_parts import Entry, agreed, find_trees, iter_trees
from smallmath_jax.train.loop import StopSignal

SHOWN_TREES = 200  # as pages, of each problem its first search
GRADED_TOGETHER = 64  # trees
LEAVES = (
    *(ballots.MAJORITY, ballots.BEST, ballots.WEIGHTED, ballots.POSTERIOR),
    ballots.COVERAGE,
)
Groups = list[list[measures.Searched]]


def evaluate(
    config: Any, problems: list[Problem], this_run: Run, host: Host, stop: StopSignal
) -> dict[str, Any]:
    """Runs `config.eval.method` on every problem; writes result.json and pages of trees. Returns the result.

    Besides the fields of metrics.summarise: `votes` (measure -> share, by set, level and subject), `leaves` (the same
    of the answers of one search), `tokens` (mean of a trajectory or search, by set), `scaling` and `stopping`.
    """
    folder = this_run.workdir
    mesh = make_mesh(config)
    source = identity.source_of(config)
    policy = load_policy(config, mesh)
    judge = load_judge(config.judge, policy, config, mesh) if config.judge else None
    driver = Driver(policy, make_engine(policy, config), host, judge=judge, **drawing(config))
    scale = judge.scale if judge else None
    kept, prompts, left_out = prompts_for(problems, policy, config)
    if not kept:
        raise ValueError(f"{folder}: no problem could be evaluated; left out: {left_out}")
    named = identity.identity_of(
        driver.engine, kept, prompts, config, source, **_more_identity(config, driver)
    )
    identity.keep_or_drop(folder, named)
    if config.eval.method == "sample":
        pairs = list(zip(kept, prompts, strict=True))
        result = _sampled(driver, pairs, config, folder, stop, scale)
    else:
        result = _searched(driver, kept, config, folder, stop, scale)
    result["left_out"] = left_out
    if hosts.host_index() == 0:
        write_text(folder / "result.json", to_json(result))
    return result


def _more_identity(config: Any, driver: Driver) -> dict[str, Any]:
    """What decides the answers besides the policy, its prompts and `config.eval`."""
    settings = {"method": config.eval.method, "step": config.sampling.to_dict()}
    if driver.judge is not None:
        settings["judge"] = driver.judge.engine.weights_digest()
    if config.eval.method != "sample":
        settings |= {"searches": config.eval.searches, "search": config.search.to_dict()}
    return settings


# ---- trajectories in one go


def _sampled(
    driver: Driver,
    pairs: Sequence[Any],
    config: Any,
    folder: epath.Path,
    stop: StopSignal,
    scale: Scale | None,
) -> dict[str, Any]:
    settings = config.eval
    code = chains.sample_all(
        driver,
        pairs,
        folder / "completions",
        samples=settings.samples,
        sampling=sampling_of(settings.sampling),
        settings=search_settings(config.search, seed=config.seed),
        seed=config.seed,
        stop=stop,
        max_tokens=settings.sampling.max_tokens,
        watchdog_s=config.watchdog_s,
        title="evaluate",
        greedy=settings.greedy,
    )
    if code:
        runs.say("evaluate: stopped, what is done is kept; the same command continues")
        sys.exit(code)
    rows = list(read_parts(folder / "completions"))
    result = metrics.summarise(rows, settings.headline, tuple(settings.k), ballots.equal)
    cases = measures.sample_cases(rows)
    if not cases:
        return result
    found = ballots.measures((*measures.AT_N, ballots.COVERAGE), scale)
    return result | {
        "answers": f"{settings.samples} sampled trajectories",
        "votes": _with_sets(cases, found),
        "tokens": tokens_of(cases),
        "scaling": measures.all_scaling(rows, [], scale, 0),
        "stopping": measures.all_stopping(rows, [], scale, 0),
    }


# ---- trees


def walk_of(config: Any) -> Callable[..., Any]:
    """How a problem is searched, by `config.eval.method`."""
    settings = config.eval
    return {
        "mcts": search,
        "chains": functools.partial(sample_chains, count=settings.searches),
        "beam": functools.partial(beam_search, width=settings.beam_width),
    }[settings.method]


def _searched(
    driver: Driver,
    problems: list[Problem],
    config: Any,
    folder: epath.Path,
    stop: StopSignal,
    scale: Scale | None,
) -> dict[str, Any]:
    settings = config.eval
    by_chains = settings.method == "chains"
    unguided = {"guidance": "terminal"} if by_chains else {}  # no step is chosen, so none is scored
    found = searched_groups(
        driver,
        problems,
        search_settings(config.search, seed=config.seed, **unguided),
        folder / "trees",
        config,
        stop=stop,
        searches=1 if by_chains else settings.searches,
        walk=walk_of(config),
        read=measures.chains_case if by_chains else measures.searched,
        title=settings.method,
        pages=folder / "report" / "trees",
    )
    if by_chains:
        return _tree_result([one for (one,) in found], [], config, scale)
    return _tree_result([measures.searches_case(group) for group in found], found, config, scale)


def _tree_result(
    cases: list[Case], groups: Groups, config: Any, scale: Scale | None
) -> dict[str, Any]:
    settings = config.eval
    names = (*measures.AT_N, ballots.COVERAGE)
    found = ballots.measures(names, scale, settings.top_k)
    votes = _with_sets(cases, found)
    single = _singles(cases)
    published = ballots.PUBLISHED.format(k=settings.top_k)
    one = single if settings.searches == 1 else votes.get(published, votes[ballots.MAJORITY])
    chosen = published if published in votes else ballots.MAJORITY
    what = "chains" if settings.method == "chains" else "searches"
    result = dict(one) | {
        "decoding": "search" if settings.searches == 1 else chosen,
        "search": single,
        "answers": f"{settings.searches} {what} ({settings.method})",
        "votes": votes,
        "tokens": tokens_of(cases),
        "scaling": ballots.scaling(cases, found, measures.SEARCHES),
    }
    if not groups:
        return result | {"stopping": measures.stopping(cases, found, "chains")}
    leaves = [group[0].leaves for group in groups]
    result["leaves"] = _with_sets(leaves, ballots.measures(LEAVES, scale))
    if (
        settings.method == "beam"
    ):  # its answers come by level, not by rollout: nothing to stop early
        return result
    return result | {
        "scaling": measures.all_scaling([], groups, scale, settings.top_k),
        "stopping": measures.all_stopping([], groups, scale, settings.top_k),
        "failed": sum(one.failed for group in groups for one in group),
    }


def _main(cases: list[Case]) -> list[Case]:
    return metrics.main_set(cases, lambda case: case.set)


def _with_sets(
    cases: list[Case], found: Mapping[str, ballots.Measure]
) -> dict[str, dict[str, Any]]:
    """Shares of the main sets' problems, with by_set of every set (metrics.main_set)."""
    every = grouped_shares(cases, found)
    main = grouped_shares(_main(cases), found)
    return {name: one | {"by_set": every[name]["by_set"]} for name, one in main.items()}


def _singles(cases: list[Case]) -> dict[str, Any]:
    """pass@1 of one search or chain: the mean over all that a problem has, in the form of metrics.accuracy."""
    rows = []
    for case in cases:
        verdicts = {answer.unit: answer.verdict for answer in case.answers}
        for unit in range(case.units):
            row = {"problem_id": case.problem_id, "verdict": verdicts.get(unit, "no_answer")}
            rows.append(row | {"set": case.set, "level": case.level, "subject": case.subject})
    main = metrics.main_set(rows, lambda row: row["set"])
    result = metrics.accuracy(main)
    result["by_level"] = metrics.by(main, lambda row: row["level"])
    result["by_subject"] = metrics.by(main, lambda row: row["subject"])
    result["by_set"] = metrics.by(rows, lambda row: row["set"])
    return result


def tokens_of(cases: list[Case]) -> dict[str, Any]:
    """Mean tokens the policy wrote for one trajectory or one complete search, of all problems and by set."""
    one = lambda some: mean(ballots.tokens(case) / max(case.units, 1) for case in some)
    sets = measures.grouped(cases, lambda case: case.set)
    return {"mean": one(cases), "by_set": {name: one(found) for name, found in sets.items()}}


# ---- grading


def searched_groups(
    driver: Driver,
    problems: Sequence[Problem],
    settings: SearchSettings,
    folder: epath.Path,
    config: Any,
    *,
    stop: StopSignal,
    searches: int = 1,
    walk: Callable[..., Any] = search,
    read: Callable[[Tree, Problem], Any] = measures.searched,
    title: str = "search",
    pages: epath.Path | None = None,
) -> list[list[Any]]:
    """Searches every problem `searches` times (`search.grow_trees`), grades the trees, and returns what `read` keeps.

    A list of each problem's, in the order of the seeds. `pages`: where the first SHOWN_TREES problems' first trees
    are shown. Raises RuntimeError when too many searches failed (`evolve_checks.count_failed`).
    """
    grow_trees(
        driver,
        problems,
        settings,
        folder,
        config,
        stop=stop,
        searches=searches,
        walk=walk,
        title=title,
    )
    seeds = search_seeds(settings.seed, searches)
    by_id = {problem.id: problem for problem in problems}
    entries = [one for one in find_trees([folder]) if one.problem_id in by_id]
    count_failed(agreed(entries, title), title)
    found: dict[str, dict[int, Any]] = defaultdict(dict)
    shown: list[Tree] = []
    with hosts.watchdog(config.watchdog_s):
        for tree in graded_trees(driver, entries, by_id):
            found[tree.problem_id][tree.seed] = read(tree, by_id[tree.problem_id])
            if pages is not None and tree.seed == seeds[0] and len(shown) < SHOWN_TREES:
                shown.append(tree)
            hosts.beat("grading")
    if pages is not None and hosts.host_index() == 0:
        write_tree_index(shown, pages)
    return [[found[name][seed] for seed in seeds if seed in found[name]] for name in sorted(found)]


def graded_trees(
    driver: Driver, entries: Iterable[Entry], problems: Mapping[str, Problem]
) -> Iterator[Tree]:
    """The trees of entries, in their order, with the verdict of each answer; read a few at a time."""
    trees = iter_trees(entries)
    while some := list(itertools.islice(trees, GRADED_TOGETHER)):
        asked = {
            (tree.problem_id, node.answer)
            for tree in some
            for node in tree.nodes
            if node.kind == "answer"
        }
        verdicts = asyncio.run(_verdicts(driver, problems, sorted(asked)))
        for tree in some:
            own = (answer for name, answer in asked if name == tree.problem_id)
            yield measures.graded(tree, {one: verdicts[tree.problem_id, one] for one in own})


async def _verdicts(
    driver: Driver, problems: Mapping[str, Problem], asked: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    asked = list(asked)
    found = await asyncio.gather(*(driver.grade(problems[name], answer) for name, answer in asked))
    return dict(zip(asked, found, strict=True))
