"""The stages of a round: search, select, evaluate. Each writes a folder and, at its end, done.json beside its data.

A stage whose done.json is there returns what it says; one that was cut short goes on where it stopped. Fine-tuning and
the preference model are stages of `sft` and `ppm`.
"""

import contextlib
import dataclasses
import json
import sys
import time
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
    read_parts,
    to_json,
    write_part,
    write_text,
)
from smallmath_jax.search import select
from smallmath_jax.search.beam import sample_chains
from smallmath_jax.search.mcts import search, search_seeds
from smallmath_jax.search.pairs import PairSettings
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.vote import Scale, scale_of
from smallmath_jax.tasks import chains, evolve_measures, ppm, runs, searched
from smallmath_jax.tasks.driver import Driver, Host, Judge
from smallmath_jax.tasks.policy import Policy, prompts_for
from smallmath_jax.tasks.recheck import recheck, relabel
from smallmath_jax.tasks.rollouts import engine_weights, make_engine
from smallmath_jax.tasks.search import (
    drawing,
    grow_trees,
    make_judge,
    read_trees,
    search_settings,
)
from smallmath_jax.tasks.server import Client, ServerEngine, settings_of
from smallmath_jax.train.loop import StopSignal

DONE = "done.json"


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
    if found := manifest(folder):
        return found
    started = time.time()
    with round_driver(bench, number, policy, judge, problems) as driver:
        record = _search_round(bench, number, driver, problems)
    return write_manifest(folder, record, started)


@contextlib.contextmanager
def round_driver(
    bench: Bench, number: int, policy: Policy, judge: Policy | None, problems: Sequence[Problem]
) -> Iterator[Driver]:
    """What a round searches with: the policy, or in round 1 the server that `config.bootstrap.base_url` names."""
    config, bootstrap = bench.config, bench.config.bootstrap
    if number > 1 or not bootstrap.base_url:
        guided = guidance_of(config, number) == "ppm"
        yield bench.driver(policy, judge if guided else None, number - 1)
        return
    client = Client(settings_of(bootstrap))
    length = config.engine.cache_length
    asked = drawing(config)
    asked["sampling"] = Sampling(temperature=bootstrap.temperature)
    with ServerEngine(client, policy.tokens, problems, length) as engine:
        yield Driver(policy, engine, bench.host, **asked)


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
    if number >= config.evolve.more_from and config.evolve.more and left:
        tried = left[: config.evolve.more_problems or None]
        if config.evolve.control:
            again = dataclasses.replace(settings, seed=search_seeds(config.seed, 1000)[-1])
            grow(tried, again, "control")
            missed = _unsolved(bench, folder, ["control"], {p.id: p for p in tried})
            record |= {"tried_more": len(tried), "solved_by_control": len(tried) - len(missed)}
        for total in config.evolve.more:
            some = {problem.id: problem for problem in tried}
            earlier = {one.problem_id: one for one in _trees(folder) if one.seed == settings.seed}
            more = dataclasses.replace(settings, rollouts=total, widen=True)
            grow(tried, more, f"more_{total}", earlier=earlier, searches=config.evolve.more_seeds)
            tried = _unsolved(bench, folder, [f"more_{total}"], some)
            record[f"solved_by_{total}"] = len(some) - len(tried)
    return record


def _tree_folders(folder: epath.Path) -> list[epath.Path]:
    """Folders of trees in the order in which later ones stand in for earlier ones; the control is none of them."""
    more = sorted(folder.glob("more_*"), key=lambda path: int(path.name.removeprefix("more_")))
    return [folder / "trees", *more]


def _trees(folder: epath.Path) -> list[Tree]:
    return read_trees(_tree_folders(folder))


def _unsolved(
    bench: Bench, folder: epath.Path, names: Iterable[str], problems: Mapping[str, Problem]
) -> list[Problem]:
    """The problems none of whose trees in these folders holds a right answer that is right by reasoning."""
    trees, _ = checked_trees(bench, folder, [folder / name for name in names], problems)
    solved = {tree.problem_id for tree in trees if has_right(tree)}
    return [problem for problem in problems.values() if problem.id not in solved]


def checked_trees(
    bench: Bench,
    folder: epath.Path,
    folders: Sequence[epath.Path],
    problems: Mapping[str, Problem],
) -> tuple[list[Tree], dict[str, int]]:
    """Trees with lucky answers relabelled. What was found is kept in FOLDER/checks, so programs run once."""
    name = "+".join(path.name for path in folders)
    path = folder / "checks" / f"{name}.json"
    trees = read_trees(folders)
    if path.exists():
        found = json.loads(path.read_text())
        lucky = {(row["problem_id"], row["seed"]): row["tags"] for row in found["lucky"]}
        trees = [relabel(tree, lucky.get((tree.problem_id, tree.seed), ())) for tree in trees]
        return trees, found["counts"]
    after, counts = recheck(trees, problems, bench.host, bench.config.evolve.instances)
    rows = [
        {"problem_id": tree.problem_id, "seed": tree.seed, "tags": _changed(tree, new)}
        for tree, new in zip(trees, after, strict=True)
    ]
    found = {"counts": counts, "lucky": [row for row in rows if row["tags"]]}
    if hosts.host_index() == 0:
        write_text(path, json.dumps(found))
    hosts.barrier(f"checked {folder} {name}")
    return after, counts


def _changed(before: Tree, after: Tree) -> list[str]:
    pairs = zip(before.nodes, after.nodes, strict=True)
    return [old.tag for old, new in pairs if old.verdict != new.verdict]


def has_right(tree: Tree) -> bool:
    return any(node.verdict == "correct" for node in tree.nodes)


# ---- select


def select_stage(bench: Bench, number: int, problems: Sequence[Problem]) -> dict[str, Any]:
    """From the round's trees: trajectories to fine-tune on, preference pairs, what was solved, difficulty, coverage."""
    folder = bench.round_folder(number) / "select"
    if found := manifest(folder):
        return found
    started = time.time()
    config, searched = bench.config, bench.round_folder(number) / "search"
    by_id = {problem.id: problem for problem in problems}
    trees, counts = checked_trees(bench, searched, _tree_folders(searched), by_id)
    groups: dict[str, list[Tree]] = {}
    for tree in trees:
        groups.setdefault(tree.problem_id, []).append(tree)
    mistrusted = [name for name in groups if is_noise(by_id.get(name), groups[name])]
    for name in mistrusted:
        del groups[name]
    chosen = [one for group in groups.values() for one in trajectories_of(group, config)]
    medium = [
        tree for group in groups.values() if select.difficulty(group) == "medium" for tree in group
    ]
    lengths = {tree.problem_id: 0 for tree in medium}
    pairs, pair_counts = ppm.pairs_of(medium, PairSettings(**config.pairs.to_dict()), lengths)
    solved = sorted(name for name, group in groups.items() if any(map(has_right, group)))
    if hosts.host_index() == 0:
        write_part(folder / "sft", "00000.jsonl", [trajectory_row(one) for one in chosen])
        write_part(folder / "pairs", "00000.jsonl", pairs)
    record = select.summary(trees) | counts | {"pairs": pair_counts, "pairs_kept": len(pairs)}
    record |= {"sft_examples": len(chosen), "solved_ids": solved, "label_noise": len(mistrusted)}
    record["asked_ids"] = sorted({tree.problem_id for tree in trees})
    record["by_stop"] = {
        reason: sum(tree.stopped == reason for tree in trees)
        for reason in sorted({tree.stopped for tree in trees})
    }
    return write_manifest(folder, record, started)


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


def trajectory_row(one: select.Trajectory) -> dict[str, Any]:
    """A line of sft/*.jsonl."""
    return {
        "problem_id": one.problem_id,
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


# ---- evaluate


def evaluate_stage(
    bench: Bench, number: int, policy: Policy, judge: Policy | None, final: bool
) -> dict[str, Any]:
    """Measures the round's policy on the held-out problems: trajectories without search and, with a judge, trees."""
    folder = bench.round_folder(number) / "evaluate"
    if found := manifest(folder):
        return found
    started = time.time()
    config = bench.config
    samples = config.eval.final_samples if final else config.eval.samples
    driver = bench.driver(policy, judge, number)
    kept, prompts, left_out = prompts_for(bench.tests, policy, config)
    whole = chains.sample_all(
        driver,
        list(zip(kept, prompts, strict=True)),
        folder / "completions",
        samples=samples,
        seed=config.seed,
        stop=bench.stop,
        max_tokens=config.eval.sampling.max_tokens,
        title=f"round {number} evaluate",
    )
    if not whole:
        runs.say("evaluation stopped, what is finished is saved; the same command continues")
        sys.exit(bench.stop.exit_code)
    hosts.barrier(f"completions {folder}")
    rows = list(read_parts(folder / "completions"))
    scale = None if judge is None else bench.scale()
    record = evolve_measures.chain_measures(rows, config.eval.samples, scale)
    groups: searched.Groups = []
    if judge is not None:
        limit = config.eval.final_search_problems if final else config.eval.search_problems
        groups = searched.searched_groups(
            driver,
            kept[: limit or None],
            search_settings(config.eval.search, seed=config.seed, round=number),
            folder / "trees",
            config,
            stop=bench.stop,
            searches=config.eval.final_searches if final else 1,
            title=f"round {number} search test",
        )
        _keep_verdicts(groups, folder)
        numbers = evolve_measures.search_measures(groups, scale)
        sets = numbers.pop("by_set")
        for name, found in sets.items():
            record["by_set"][name] |= found
        record |= numbers
    if final:
        asked = {group[0].leaves.problem_id for group in groups}
        same = [row for row in rows if row["problem_id"] in asked] or rows
        record["scaling"] = evolve_measures.all_scaling(same, groups, scale, config.eval.top_k)
        record["stopping"] = evolve_measures.all_stopping(same, groups, scale, config.eval.top_k)
    record["left_out"] = left_out
    return write_manifest(folder, record, started)


def _keep_verdicts(groups: searched.Groups, folder: epath.Path) -> None:
    """What the answers of the evaluation's trees were graded, for `graded_trees`."""
    found = {
        (one.leaves.problem_id, answer.ballot.answer): answer.verdict
        for group in groups
        for one in group
        for answer in one.leaves.answers
    }
    names = ("problem_id", "answer", "verdict")
    rows = [dict(zip(names, (*key, found[key]), strict=True)) for key in sorted(found)]
    if hosts.host_index() == 0:
        write_part(folder / "verdicts", "00000.jsonl", rows)
    hosts.barrier(f"verdicts {folder}")


def graded_trees(folder: epath.Path) -> list[Tree]:
    """The trees of an evaluation, with the verdicts that were given afterwards. [] where nothing was searched."""
    verdicts: dict[str, dict[str, str]] = {}
    for row in read_parts(folder / "verdicts"):
        verdicts.setdefault(row["problem_id"], {})[row["answer"]] = row["verdict"]
    return [
        evolve_measures.graded(tree, verdicts.get(tree.problem_id, {}))
        for tree in read_trees([folder / "trees"])
    ]
