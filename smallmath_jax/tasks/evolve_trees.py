"""What a self-evolution run shows of its search trees: pages, turning back, steps that name a theorem.

    WORKDIR/report/trees/           trees of the last round's search, and every tree an example is taken from
    WORKDIR/report/trees_held_out/  the same of the evaluations' searches

Both kinds of trees are read for what a preference model's scores tell: training trees of the rounds that searched with
one, and held-out trees of every evaluation that did, where answers are scored too.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smallmath_jax.records import Tree
from smallmath_jax.report import insights
from smallmath_jax.report.trees import page_name, write_tree_index
from smallmath_jax.tasks.evolve_evaluate import graded_trees
from smallmath_jax.tasks.evolve_stages import Bench
from smallmath_jax.tasks.tree_parts import Entry, find_trees, iter_trees

SHOWN_TREES = 200  # of the last round, as pages, beside those of the examples
FOLDERS = {"search": "trees", "evaluate": "trees_held_out"}  # stage -> folder of its pages
TITLES = {
    "search": "Search trees of round {}",
    "evaluate": "Searches of held-out problems, round {}",
}


def tell_trees(bench: Bench, last: int) -> dict[str, Any]:
    """The fields `backtracking` and `theorems` of evolution.json over rounds 1 to `last`; writes the trees' pages.

    Trees pass one at a time, all of them once, and once more those that are shown.
    """
    entries = {
        (stage, number): trees_of(bench, stage, number)
        for stage in FOLDERS
        for number in range(1, last + 1)
    }
    addresses: dict[tuple[str, int], list[str]] = {key: [] for key in entries}

    def passing() -> Iterator[Tree]:
        for key, found in entries.items():
            for tree in read(bench, *key, found):
                addresses[key].append(page_address(tree))
                yield tree

    record = insights.insights(passing(), page_address)
    linked = linked_pages(record)
    for stage, folder in FOLDERS.items():
        shown = {
            number: shown_trees(found, addresses[stage, number], linked, number == last)
            for number in range(last, 0, -1)
            if (found := entries[stage, number])
        }
        if any(shown.values()):
            trees = (one for n, some in shown.items() for one in read(bench, stage, n, some))
            title = TITLES[stage].format(last)
            write_tree_index(trees, bench.root / "report" / folder, title=title)
    return record


def trees_of(bench: Bench, stage: str, number: int) -> list[Entry]:
    """The trees of a round's evaluation, or of its search before any problem was given more rollouts."""
    return find_trees([bench.round_folder(number) / stage / "trees"])


def read(bench: Bench, stage: str, number: int, entries: Sequence[Entry]) -> Iterator[Tree]:
    """The trees of some entries of `trees_of`, in their order, held-out ones with their verdicts."""
    if stage == "search":
        return iter_trees(entries)
    return graded_trees(bench.round_folder(number) / stage, entries)


def page_address(tree: Tree) -> str:
    """Where a tree's page is, as seen from WORKDIR/report/index.html."""
    stage = "evaluate" if insights.is_held_out(tree) else "search"
    return f"{FOLDERS[stage]}/{page_name(tree)}"


def linked_pages(record: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The pages that examples of the fields link to."""
    examples = (one for field in record.values() for one in field["examples"])
    return {one["page"].partition("#")[0] for one in examples}


def shown_trees(
    entries: Sequence[Entry], addresses: Sequence[str], linked: set[str], latest: bool
) -> list[Entry]:
    """The trees of a round that are linked and, of the latest, its first; `addresses`: of the pages of all."""
    first = SHOWN_TREES if latest else 0
    pairs = enumerate(zip(entries, addresses, strict=True))
    return [one for place, (one, address) in pairs if place < first or address in linked]
