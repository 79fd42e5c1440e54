"""The last stage of a round of self-evolution: what its policy and preference model are worth on held-out problems."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import Tree, read_parts, write_part
from smallmath_jax.tasks import chains, evolve_measures, runs, searched
from smallmath_jax.tasks.evolve_stages import Bench, agreed_manifest, write_manifest
from smallmath_jax.tasks.policy import Policy, prompts_for
from smallmath_jax.tasks.rollouts import sampling_of
from smallmath_jax.tasks.search import search_settings
from smallmath_jax.tasks.tree_parts import Entry, iter_trees


def evaluate_stage(
    bench: Bench, number: int, policy: Policy, judge: Policy | None, final: bool
) -> dict[str, Any]:
    """Measures the round's policy on the held-out problems: trajectories without search and, with a judge, trees."""
    folder = bench.round_folder(number) / "evaluate"
    if found := agreed_manifest(folder):
        return found
    started = time.time()
    config = bench.config
    samples = config.eval.final_samples if final else config.eval.samples
    driver = bench.driver(policy, judge, number)
    kept, prompts, left_out = prompts_for(bench.tests, policy, config)
    code = chains.sample_all(
        driver,
        list(zip(kept, prompts, strict=True)),
        folder / "completions",
        samples=samples,
        sampling=sampling_of(config.eval.sampling),
        settings=search_settings(config.search, seed=config.seed, round=number),
        seed=config.seed,
        stop=bench.stop,
        max_tokens=config.eval.sampling.max_tokens,
        watchdog_s=config.watchdog_s,
        title=f"round {number} evaluate",
    )
    if code:
        runs.say("evaluation stopped, what is finished is saved; the same command continues")
        sys.exit(code)
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


def graded_trees(folder: epath.Path, entries: Iterable[Entry]) -> Iterator[Tree]:
    """The trees of these entries of an evaluation, with the verdicts that were given afterwards."""
    verdicts: dict[str, dict[str, str]] = {}
    for row in read_parts(folder / "verdicts"):
        verdicts.setdefault(row["problem_id"], {})[row["answer"]] = row["verdict"]
    for tree in iter_trees(entries):
        yield evolve_measures.graded(tree, verdicts.get(tree.problem_id, {}))
