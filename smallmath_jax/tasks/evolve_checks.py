"""Which of a round's searches count: those that did not fail, and right answers that are right by reasoning."""

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import Problem, Tree, write_text
from smallmath_jax.tasks import runs
from smallmath_jax.tasks.driver import Host
from smallmath_jax.tasks.recheck import can_check, recheck, relabel
from smallmath_jax.tasks.tree_parts import FAILED, Entry, by_problem, iter_trees, my_block

FAILED_SHARE = 0.05  # of a stage's searches: more means that something is broken, not a problem
CHECKED_TOGETHER = 64  # problems whose programs run at the same time


def count_failed(entries: Sequence[Entry], title: str) -> int:
    """How many of the searches failed. Raises RuntimeError when they are more than FAILED_SHARE of all.

    Then the stage is not finished, and the same command tries them again: a server was gone, a disk was full. A few
    that always fail must not hold up all others, and are left as they are.
    """
    failed = sum(entry.stopped == FAILED for entry in entries)
    if failed > FAILED_SHARE * len(entries):
        raise RuntimeError(
            f"{title}: {failed} of {len(entries)} searches failed (the reasons are in the trees' extra.failure); "
            "mend what stopped them, then the same command tries them again"
        )
    if failed:
        runs.say(f"{title}: {failed} of {len(entries)} searches failed and are left out")
    return failed


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found of the right answers of some trees: how many, and which are right by luck alone."""

    counts: dict[str, int]
    lucky: dict[tuple[str, int], list[str]]  # (problem id, seed) -> tags of its lucky answers

    def solved(self, entries: Iterable[Entry]) -> set[str]:
        """The problems with an answer that is right by reasoning."""
        right = (one for one in entries if one.right > len(self.lucky.get(one.key, ())))
        return {one.problem_id for one in right}

    def relabelled(self, tree: Tree) -> Tree:
        """The tree with its lucky answers wrong."""
        return relabel(tree, self.lucky.get((tree.problem_id, tree.seed), ()))


def checked(
    host: Host,
    config: Any,
    folder: epath.Path,
    folders: Sequence[epath.Path],
    entries: Sequence[Entry],
    problems: Mapping[str, Problem],
) -> Checked:
    """The check of these trees, each host's share by itself. It is kept in FOLDER/checks, so programs run once."""
    path = folder / "checks" / f"{'+'.join(one.name for one in folders)}.json"
    first = hosts.host_index() == 0
    digest = digest_of(entries)
    found = hosts.broadcast(json.loads(path.read_text()) if first and path.exists() else None)
    if found is None or found.get("trees") != digest:  # failed searches were tried again since
        told = hosts.gather(_check_share(host, config, my_block(entries), problems))
        counts: Counter[str] = Counter(right_answers=0, lucky=0)
        for one in told:
            counts.update(one["counts"])
        found = {"trees": digest, "counts": dict(counts)}
        found["lucky"] = [row for one in told for row in one["lucky"]]
        if first:
            write_text(path, json.dumps(found))
        hosts.barrier(f"checked {path}")
    lucky = {(row["problem_id"], row["seed"]): row["tags"] for row in found["lucky"]}
    return Checked(found["counts"], lucky)


def digest_of(entries: Iterable[Entry]) -> str:
    """Names which trees these are and how they ended, whatever part they lie in."""
    rows = [[*one.key, one.stopped, one.right] for one in entries]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def _check_share(
    host: Host, config: Any, entries: Sequence[Entry], problems: Mapping[str, Problem]
) -> dict[str, Any]:
    """Counts and lucky answers of some trees, of which only those with a right answer to check are read."""
    instances = config.evolve.instances
    asked = (one for one in entries if one.right and can_check(problems.get(one.problem_id)))
    groups = by_problem(iter_trees(asked if instances else ()))
    counts: Counter[str] = Counter()
    lucky = []
    with hosts.watchdog(config.watchdog_s):
        while some := list(itertools.islice(groups, CHECKED_TOGETHER)):
            before = [tree for group in some for tree in group]
            after, found = recheck(before, problems, host, instances)
            counts.update(found)
            for tree, new in zip(before, after, strict=True):
                if tags := _changed(tree, new):
                    row = {"problem_id": tree.problem_id, "seed": tree.seed, "tags": tags}
                    lucky.append(row)
            hosts.beat("checking programs")
    return {"counts": dict(counts), "lucky": lucky}


def _changed(before: Tree, after: Tree) -> list[str]:
    pairs = zip(before.nodes, after.nodes, strict=True)
    return [old.tag for old, new in pairs if old.verdict != new.verdict]


def has_right(tree: Tree) -> bool:
    return any(node.verdict == "correct" for node in tree.nodes)
