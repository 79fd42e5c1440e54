"""The stages of a round before training: search, select. Each writes a folder and, at its end, done.json beside data.

Every host runs every stage and does its share of it; what depends on files is decided by host 0. Trees pass one
problem at a time: a round of some hundred thousand need not fit in memory.

A stage whose done.json is there returns what it says; one that was cut short goes on where it stopped. Fine-tuning,
the preference model and the measures are stages of `sft`, `ppm` and `evolve_evaluate`.
"""

import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from smallmath_jax.data.batches import Sequence as Tokens
from smallmath_jax.data.batches import make_sequence
from smallmath_jax.parallel import hosts
from smallmath_jax.records import (
    Problem,
    Sampling,
    Tree,
    to_json,
    write_text,
)
from smallmath_jax.search import select
from smallmath_jax.search.beam import sample_chains
from smallmath_jax.search.mcts import search, search_seeds
from smallmath_jax.search.pairs import PairSettings
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.vote import Scale, scale_of
from smallmath_jax.tasks import ppm, runs
from smallmath_jax.tasks.driver import Driver, Host, Judge
from smallmath_jax.tasks.evolve_checks import Checked, checked, count_failed, has_right
from smallmath_jax.tasks.local import open_local
from smallmath_jax.tasks.policy import Policy, prompts_for
from smallmath_jax.tasks.rollouts import engine_weights, make_engine
from smallmath_jax.tasks.search import (
    drawing,
    grow_trees,
    make_judge,
    search_settings,
)
from smallmath_jax.tasks.server import Client, ServerEngine, settings_of
from smallmath_jax.tasks.tree_parts import (
    FAILED,
    Entry,
    Rows,
    agreed,
    by_problem,
    find_trees,
    iter_trees,
    my_block,
    read_tree,
)
from smallmath_jax.train.loop import StopSignal

DONE = "done.json"
SECOND = "second"  # folder of the second pass over what the first left unsolved
CONTROL = "control"  # and of the fresh searches that further rollouts are measured against


@dataclasses.dataclass
class Bench:
    """What all rounds share. The engines are made once; `policy_engine` and `judge` give them the weights to use."""

    config: Any
    root: epath.Path
    mesh: jax.sharding.Mesh
    host: Host
    stop: StopSignal
    tests: list[Problem]
    engine: Any = None
    scorer: Judge | None = None

    def round_folder(self, number: int) -> epath.Path:
        return self.root / f"round_{number}"

    def driver(self, policy: Policy, judge: Policy | None, version: int) -> Driver:
        """A driver over engines that hold these weights."""
        config = self.config
        if self.engine is None:
            self.engine = make_engine(policy, config)
        self.engine.set_weights(engine_weights(policy.model, config), version)
        scorer = None
        if judge is not None:
            if self.scorer is None:
                self.scorer = make_judge(judge, config, self.scale())
            self.scorer.engine.set_weights(engine_weights(judge.model, config), version)
            scorer = self.scorer
        return Driver(policy, self.engine, self.host, judge=scorer, **drawing(config))

    def scale(self) -> Scale:
        """How the rounds' preference models are read."""
        return scale_of(self.config.ppm.loss, self.config.ppm.tanh_in_loss)


def manifest(folder: epath.Path) -> dict[str, Any] | None:
    """What a finished stage says of itself; None while it is not finished."""
    path = folder / DONE
    return json.loads(path.read_text()) if path.exists() else None


def agreed_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """`manifest` as host 0 sees it, so that all hosts do the stage or none; every host must call this together."""
    return hosts.broadcast(manifest(folder) if hosts.host_index() == 0 else None)


def write_manifest(folder: epath.Path, record: Mapping[str, Any], started: float) -> dict[str, Any]:
    """Marks a stage as finished. `wall_s` is of its last start."""
    record = {**record, "wall_s": round(time.time() - started, 1)}
    if hosts.host_index() == 0:
        write_text(folder / DONE, json.dumps(json.loads(to_json(record)), indent=1))
    hosts.barrier(f"done {folder}")
    return record


# ---- search


def round_settings(config: Any, number: int) -> SearchSettings:
    """SearchSettings of a round: rollouts, candidates and guidance by `config.evolve`."""
    evolve = config.evolve
    return search_settings(
        config.search,
        seed=config.seed,
        round=number,
        rollouts=evolve.rollouts[number - 1],
        candidates=evolve.candidates[number - 1],
        guidance=guidance_of(config, number),
        max_errors=evolve.max_errors[number - 1],
    )


def guidance_of(config: Any, number: int) -> str:
    """What guides a round's search; whole trajectories without search are guided by nothing."""
    return config.evolve.guidance[number - 1] if config.evolve.sampler == "mcts" else "terminal"


async def plain_samples(
    problem: Problem,
    root: Any,
    *,
    settings: SearchSettings,
    tree: Tree | None = None,
    **callables: Any,
) -> Tree:
    """As many independent trajectories as a search would take rollouts, in a tree that branches at its root alone.

    A tree that goes on is drawn again from its start: the same keys give its trajectories once more, then new ones.
    """
    count = settings.rollouts
    return await sample_chains(problem, root, count=count, settings=settings, **callables)


# `config.evolve.sampler` -> where a round's trajectories come from. The baselines of the ablation of SFT data (section
# 9.1: random sampling, rejection sampling) draw them without search.
SAMPLERS: dict[str, Callable[..., Any]] = {"mcts": search, "chains": plain_samples}


def search_stage(
    bench: Bench, number: int, policy: Policy, judge: Policy | None, problems: list[Problem]
) -> dict[str, Any]:
    """Searches the round's problems, then those left unsolved with more rollouts (section 3.4.4)."""
    folder = bench.round_folder(number) / "search"
    if found := agreed_manifest(folder):
        return found
    started = time.time()
    problems = searchable(bench.config, number, problems)
    with round_driver(bench, number, policy, judge, problems) as driver:
        record = _search_round(bench, number, driver, problems)
    return write_manifest(folder, record, started)


@contextlib.contextmanager
def round_driver(
    bench: Bench, number: int, policy: Policy, judge: Policy | None, problems: Sequence[Problem]
) -> Iterator[Driver]:
    """What a round searches with: the policy, or in round 1 the server or local model that `bootstrap` names."""
    config, bootstrap = bench.config, bench.config.bootstrap
    if number > 1 or not (bootstrap.base_url or bootstrap.model):
        guided = guidance_of(config, number) == "ppm"
        yield bench.driver(policy, judge if guided else None, number - 1)
        return
    asked = drawing(config)
    asked["sampling"] = Sampling(temperature=bootstrap.temperature)
    asked["max_tokens"] = bootstrap.max_tokens
    if bootstrap.base_url:
        client = Client(settings_of(bootstrap))
        length = config.engine.cache_length
        engine = ServerEngine(client, policy.tokens, problems, length, bootstrap.shots)
    else:
        engine = open_local(config, policy.tokens, problems, bench.mesh)
    with engine:
        yield Driver(policy, engine, bench.host, **asked)


def searchable(config: Any, number: int, problems: list[Problem]) -> list[Problem]:
    """The problems a round can search: the few-shot prompt of another model holds no pictures."""
    if number > 1 or not (config.bootstrap.base_url or config.bootstrap.model):
        return problems
    texts = [problem for problem in problems if not problem.images]
    if len(texts) < len(problems):
        runs.say(
            f"round {number}: {len(problems) - len(texts)} problems with pictures wait for the next round"
        )
    return texts


def _search_round(
    bench: Bench, number: int, driver: Driver, problems: list[Problem]
) -> dict[str, Any]:
    """The searches of `search_stage`, and its record."""
    folder = bench.round_folder(number) / "search"
    config, settings = bench.config, round_settings(bench.config, number)
    grow = lambda some, one, name, **more: grow_trees(
        driver,
        some,
        one,
        folder / name,
        config,
        stop=bench.stop,
        title=f"round {number} {name}",
        walk=SAMPLERS[config.evolve.sampler],
        **more,
    )
    by_id = {problem.id: problem for problem in problems}
    rates = grow(problems, settings, "trees")
    left = _unsolved(bench, folder, ["trees"], by_id)
    record: dict[str, Any] = {"problems": len(problems), "unsolved_first": len(left)} | rates
    if config.evolve.second_pass and left:
        again = dataclasses.replace(settings, seed=search_seeds(config.seed, 2)[1])
        grow(left, again, SECOND)
        still = _unsolved(bench, folder, [SECOND], {one.id: one for one in left})
        record |= {"tried_twice": len(left), "solved_by_second_pass": len(left) - len(still)}
        left = still
    if number >= config.evolve.more_from and config.evolve.more and left:
        tried = left[: config.evolve.more_problems or None]
        if config.evolve.control:
            again = dataclasses.replace(settings, seed=search_seeds(config.seed, 1000)[-1])
            grow(tried, again, CONTROL)
            missed = _unsolved(bench, folder, [CONTROL], {p.id: p for p in tried})
            record |= {"tried_more": len(tried), "solved_by_control": len(tried) - len(missed)}
        for total in config.evolve.more:
            some = {problem.id: problem for problem in tried}
            before = {entry.key: entry for entry in find_trees(_tree_folders(folder))}
            more = dataclasses.replace(settings, rollouts=total, widen=True)
            grow(
                tried,
                more,
                f"more_{total}",
                earlier=_reader(before),
                searches=config.evolve.more_seeds,
            )
            tried = _unsolved(bench, folder, [f"more_{total}"], some)
            record[f"solved_by_{total}"] = len(some) - len(tried)
    # Each folder by itself: behind the tree that it was to go on from, a failed one is not seen
    named = lambda path: f"round {number} search {path.name}"
    searched = [path for path in (*_tree_folders(folder), folder / CONTROL) if path.exists()]
    record["failed"] = sum(count_failed(find_trees([path]), named(path)) for path in searched)
    return record


def _reader(entries: Mapping[tuple[str, int], Entry]) -> Callable[[str, int], Tree | None]:
    """(problem id, seed) -> the tree that goes on; one that failed is searched from its start."""

    def read(problem_id: str, seed: int) -> Tree | None:
        entry = entries.get((problem_id, seed))
        return None if entry is None or entry.stopped == FAILED else read_tree(entry)

    return read


def _tree_folders(folder: epath.Path) -> list[epath.Path]:
    """Folders of trees in the order in which later ones stand in for earlier ones; the control is none of them."""
    more = sorted(folder.glob("more_*"), key=lambda path: int(path.name.removeprefix("more_")))
    second = [folder / SECOND] if (folder / SECOND).exists() else []
    return [folder / "trees", *second, *more]


def _unsolved(
    bench: Bench, folder: epath.Path, names: Iterable[str], problems: Mapping[str, Problem]
) -> list[Problem]:
    """The problems none of whose trees in these folders holds a right answer that is right by reasoning."""
    folders = [folder / name for name in names]
    entries = agreed(find_trees(folders), f"{folder} {names}")
    solved = checked(bench.host, bench.config, folder, folders, entries, problems).solved(entries)
    return [problem for problem in problems.values() if problem.id not in solved]


# ---- select


def select_stage(bench: Bench, number: int, problems: Sequence[Problem]) -> dict[str, Any]:
    """From the round's trees: trajectories to fine-tune on, preference pairs, what was solved, difficulty, coverage."""
    folder = bench.round_folder(number) / "select"
    if found := agreed_manifest(folder):
        return found
    started = time.time()
    config, searched = bench.config, bench.round_folder(number) / "search"
    folders = _tree_folders(searched)
    by_id = {problem.id: problem for problem in problems}
    entries = agreed(find_trees(folders), str(searched))
    found = checked(bench.host, config, searched, folders, entries, by_id)
    _drop_parts(folder)
    with hosts.watchdog(bench.config.watchdog_s):
        told = hosts.gather(_select_share(bench, folder, my_block(entries), found, by_id))
    total = lambda name: sum((Counter(one[name]) for one in told), Counter())
    chosen = total("chosen")
    record = select.summary_of(total("summary")) | found.counts
    record |= {"pairs": dict(total("pairs")), "pairs_kept": chosen["pairs"]}
    record["sft_examples"] = chosen["sft"]
    record["solved_ids"] = [name for one in told for name in one["solved"]]
    record["label_noise"] = chosen["noise"]
    record["asked_ids"] = sorted({entry.problem_id for entry in entries})
    record["by_stop"] = dict(sorted(Counter(entry.stopped for entry in entries).items()))
    return write_manifest(folder, record, started)


def labelled_trees(bench: Bench, folder: epath.Path, problems: Sequence[Problem]) -> Iterator[Tree]:
    """The trees of a selected round as `select_stage` judged them: lucky answers wrong, mistrusted labels left out."""
    folders = _tree_folders(folder / "search")
    by_id = {problem.id: problem for problem in problems}
    entries = agreed(find_trees(folders), str(folder))
    found = checked(bench.host, bench.config, folder / "search", folders, entries, by_id)
    for group in by_problem(iter_trees(entries)):
        group = [found.relabelled(tree) for tree in group]
        if not is_noise(by_id.get(group[0].problem_id), group):
            yield from group


def _drop_parts(folder: epath.Path) -> None:
    """What a start that was cut short left behind: with another number of hosts it would stay."""
    if hosts.host_index() == 0:
        for name in ("sft", "pairs"):
            for part in (folder / name).glob("*.jsonl") if (folder / name).exists() else ():
                part.unlink()
    hosts.barrier(f"dropped {folder}")


def _select_share(
    bench: Bench,
    folder: epath.Path,
    entries: Sequence[Entry],
    found: Checked,
    problems: Mapping[str, Problem],
) -> dict[str, Any]:
    """Writes this host's trajectories and pairs; returns its counts and the problems it found solved, in order."""
    config = bench.config
    settings = PairSettings(**config.pairs.to_dict())
    summary, pair_counts, chosen = Counter(), Counter(), Counter()
    solved = []
    with Rows(folder / "sft") as lessons, Rows(folder / "pairs") as pairs:
        for group in by_problem(iter_trees(entries)):
            group = [found.relabelled(tree) for tree in group]
            summary.update(select.counts_of(group))
            hosts.beat("selecting")
            if is_noise(problems.get(group[0].problem_id), group):
                chosen["noise"] += 1
                continue
            best = trajectories_of(group, config)
            lessons.add(trajectory_row(one, group[0]) for one in best)
            made, counted = [], {}
            if select.difficulty(group) == "medium":
                made, counted = ppm.pairs_of(group, settings, {})
            pairs.add(made)
            pair_counts.update(counted)
            chosen.update(sft=len(best), pairs=len(made))
            if any(map(has_right, group)):
                solved.append(group[0].problem_id)
    return {"summary": summary, "pairs": pair_counts, "chosen": chosen, "solved": solved}


def is_noise(problem: Problem | None, group: Sequence[Tree]) -> bool:
    """Whether a synthetic problem's label is to be mistrusted (section 3.5); labels of people are not."""
    synthetic = problem is not None and problem.source.startswith("synthetic")
    return synthetic and select.label_noise(group)


def trajectories_of(group: Sequence[Tree], config: Any) -> list[select.Trajectory]:
    """The trajectories of one problem that its policy learns: the best by mean Q over all its trees, texts distinct."""
    count = config.evolve.trajectories
    found = [
        one
        for tree in group
        for one in select.select_sft(tree, config.evolve.selection, count, config.seed)
    ]
    unique = list({one.text: one for one in reversed(found)}.values())[::-1]
    if config.evolve.selection == "step_verified":
        unique.sort(key=lambda one: (-one.mean_q, -one.lowest_q))
    return unique[:count]


def trajectory_row(one: select.Trajectory, tree: Tree) -> dict[str, Any]:
    """A line of sft/*.jsonl; `tree`: any of its problem, which tells where the problem comes from."""
    return {
        "problem_id": one.problem_id,
        "source": tree.source,
        "origin": tree.extra.get("origin", ""),
        "licence": tree.extra.get("licence", ""),
        "token_ids": one.token_ids,
        "written": [int(flag) for flag in one.written],
        "mean_q": one.mean_q,
        "text": one.text,
    }


def lessons_of(
    rows: Iterable[Mapping[str, Any]], problems: Mapping[str, Problem], policy: Policy, config: Any
) -> list[tuple[Problem, Tokens]]:
    """Trajectories as training sequences: ids as they were drawn, an end token behind them, output masked or not."""
    asked = {row["problem_id"]: problems[row["problem_id"]] for row in rows}
    kept, prompts, _ = prompts_for(list(asked.values()), policy, config)
    known = {one.id: (one, prompt) for one, prompt in zip(kept, prompts, strict=True)}
    taught = []
    for row in rows:
        if row["problem_id"] not in known:
            continue
        problem, prompt = known[row["problem_id"]]
        ids, weights = list(row["token_ids"]), [float(flag) for flag in row["written"]]
        if not config.evolve.mask_output:
            weights = [1.0] * len(ids)
        if ids[-1] not in policy.tokens.eos_ids:
            ids, weights = [*ids, policy.tokens.im_end], [*weights, 1.0]
        ids = np.asarray(ids, np.int32)
        taught.append((problem, make_sequence(prompt, ids, np.asarray(weights, np.float32))))
    return taught
