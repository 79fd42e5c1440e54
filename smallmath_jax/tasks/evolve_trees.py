"""What a self-evolution run shows of its search trees: pages, turning back, steps that name a theorem.

    WORKDIR/report/trees/           trees of the last round's search, and every tree an example is taken from
    WORKDIR/report/trees_held_out/  the same of the evaluations' searches

Both kinds of trees are read for what a preference model's scores tell: training trees of the rounds that searched with
one, and held-out trees of every evaluation that did, where answers are scored too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from smallmath_jax.records import Tree
from smallmath_jax.report import insights
from smallmath_jax.report.trees import page_name, write_tree_index
from smallmath_jax.tasks.evolve_stages import Bench, graded_trees
from smallmath_jax.tasks.tree_parts import read_trees

SHOWN_TREES = 200  # of the last round, as pages, beside those of the examples
FOLDERS = {"search": "trees", "evaluate": "trees_held_out"}  # stage -> folder of its pages


def tell_trees(bench: Bench, last: int) -> dict[str, Any]:
    """The fields `backtracking` and `theorems` of evolution.json over rounds 1 to `last`; writes the trees' pages."""
    trees: dict[str, list[Tree]] = {"search": [], "evaluate": []}
    for number in range(1, last + 1):
        folder = bench.round_folder(number)
        trees["search"] += read_trees([folder / "search" / "trees"])
        trees["evaluate"] += graded_trees(folder / "evaluate")
    every = [*trees["search"], *trees["evaluate"]]
    record = {
        "backtracking": insights.backtracking(every, page=page_address),
        "theorems": insights.theorems(every, page=page_address),
    }
    linked = linked_pages(record)
    titles = {
        "search": f"Search trees of round {last}",
        "evaluate": f"Searches of held-out problems, round {last}",
    }
    for stage, found in trees.items():
        shown = shown_trees(found, last, linked)
        if shown:
            folder = bench.root / "report" / FOLDERS[stage]
            write_tree_index(shown, folder, title=titles[stage])
    return record


def page_address(tree: Tree) -> str:
    """Where a tree's page is, as seen from WORKDIR/report/index.html."""
    stage = "evaluate" if insights.is_held_out(tree) else "search"
    return f"{FOLDERS[stage]}/{page_name(tree)}"


def linked_pages(record: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The pages that examples of the fields link to."""
    examples = (one for field in record.values() for one in field["examples"])
    return {one["page"].partition("#")[0] for one in examples}


def shown_trees(trees: Sequence[Tree], last: int, linked: set[str]) -> list[Tree]:
    """The first trees of round `last`, and those of any round that are linked."""
    latest = [tree for tree in trees if tree.round == last][:SHOWN_TREES]
    known = {page_address(tree) for tree in latest}
    more = [tree for tree in trees if page_address(tree) in linked - known]
    return latest + more
