"""What search.analysis finds in trees, in the shapes that a self-evolution run's report shows (report/evolution.py)."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from smallmath_jax.records import Node, Tree
from smallmath_jax.search import analysis

LONGEST_PATH = 4  # steps of an example's branch that are shown
Page = Callable[[Tree], str]


def backtracking(
    trees: Iterable[Tree], examples: int = 6, page: Page | None = None
) -> dict[str, Any]:
    """Counts the trees in which search turned back (analysis.backtracks), and tells some: the field `backtracking`.

    Only trees that a preference model scored count; `nodes` are their scored nodes, `left_out` the other trees. A tree
    counts once, by its deepest fall; `above` are those whose branch taken never scored as low as the one left did.
    Examples: answers known to be right first, then the deepest falls. `page` gives the address of a tree's page.
    """
    counts = dict.fromkeys(("trees", "nodes", "count", "right", "above", "left_out"), 0)
    falls: list[float] = []
    found: list[tuple[Any, Tree, analysis.Backtrack]] = []
    by_round: dict[str, dict[str, int]] = defaultdict(lambda: {"trees": 0, "nodes": 0, "count": 0})
    for tree in trees:
        nodes = len(analysis.scored_nodes(tree))
        if not nodes:
            counts["left_out"] += 1
            continue
        turns = analysis.backtracks(tree)
        for cell in (counts, by_round[searched_in(tree)]):
            cell["trees"] += 1
            cell["nodes"] += nodes
            cell["count"] += bool(turns)
        if not turns:
            continue
        turn = max(turns, key=lambda one: one.fall)
        falls.append(turn.fall)
        correct = next(n.verdict for n in tree.nodes if n.tag == tree.chosen) == "correct"
        counts["right"] += correct
        counts["above"] += turn.stays_above
        found.append(((not correct, -turn.fall), tree, turn))
        found = sorted(found, key=lambda one: one[0])[:examples]  # a stream of trees need not fit
    result: dict[str, Any] = counts | {"median_fall": statistics.median(falls) if falls else None}
    result["examples"] = [_example(tree, turn, page) for _, tree, turn in found]
    if len(by_round) > 1:
        result["by_round"] = dict(sorted(by_round.items(), key=_round_order))
    return result


def searched_in(tree: Tree) -> str:
    """The round a tree was searched in, as a row of the report names it."""
    return f"{tree.round}, held out" if is_held_out(tree) else str(tree.round)


def is_held_out(tree: Tree) -> bool:
    """Whether the search never saw a gold answer, as in evaluations."""
    return not tree.extra.get("settings", {}).get("use_gold", True)


def _round_order(item: tuple[str, Any]) -> tuple[int, bool]:
    number, _, kind = item[0].partition(",")
    return int(number), bool(kind)


def _example(tree: Tree, turn: analysis.Backtrack, page: Page | None) -> dict[str, Any]:
    by_tag = {node.tag: node for node in tree.nodes}
    steps = lambda tags: [_step(by_tag[tag]) for tag in tags]
    parts = turn.at.split(".")
    before = [
        ".".join(parts[:end]) for end in range(2, len(parts) + 1)
    ]  # below the root, down to the fork
    answer = by_tag[tree.chosen].answer
    example = {
        "problem_id": tree.problem_id,
        "problem": tree.problem,
        "gold": tree.gold,
        "answer": "" if answer is None else answer,
        "prefix": steps(before[-LONGEST_PATH:]),
        "left": steps(turn.left[:LONGEST_PATH]),
        "taken": steps(turn.taken[:LONGEST_PATH]),
        "images": list(tree.images),
    }
    return example | ({"page": f"{page(tree)}#{turn.left[0]}"} if page else {})


def _step(node: Node) -> dict[str, Any]:
    return {
        "tag": node.tag,
        "text": node.text,
        "score": node.score,
        "q": node.q_value if node.visit_count else None,
    }


def theorems(trees: Sequence[Tree], examples: int = 6, page: Page | None = None) -> dict[str, Any]:
    """The scores of steps that name a theorem against those of other steps, with examples: the field `theorems`.

    Only steps that a preference model scored count. Steps of one tree hang together: a mean is over all steps, its 95 %
    interval counts each tree as one draw (cluster-robust; none below two trees). Examples: the highest scores, one a
    theorem.
    """
    groups: dict[str, list[tuple[int, Node]]] = defaultdict(list)
    by_name: dict[str, list[tuple[int, Node]]] = defaultdict(list)
    for number, tree in enumerate(trees):
        for node in analysis.scored_steps(tree):
            named = analysis.theorems_in(node.text)
            groups["theorem" if named else "other"].append((number, node))
            for name in named:
                by_name[name].append((number, node))
    best = {name: max(found, key=lambda one: one[1].score) for name, found in by_name.items()}
    order = sorted(best, key=lambda name: -best[name][1].score)[:examples]
    return {
        "theorem": _stat(groups["theorem"]),
        "other": _stat(groups["other"]),
        "within": analysis.theorem_gap(trees),
        "by_theorem": {name: _stat(found) for name, found in by_name.items()},
        "examples": [_theorem_example(name, trees, *best[name], page) for name in order],
    }


def _theorem_example(
    name: str, trees: Sequence[Tree], number: int, node: Node, page: Page | None
) -> dict[str, Any]:
    example = _step(node) | {"theorem": name}
    return example | ({"page": f"{page(trees[number])}#{node.tag}"} if page else {})


def _stat(found: list[tuple[int, Node]]) -> dict[str, Any]:
    """{"n", "trees", "mean_score", "mean_q", "ci"} of (tree, step)s."""
    if not found:
        return {"n": 0, "trees": 0}
    scores: dict[int, list[float]] = defaultdict(list)
    for number, node in found:
        scores[number].append(node.score)
    mean = sum(map(sum, scores.values())) / len(found)
    result = {
        "n": len(found),
        "trees": len(scores),
        "mean_score": mean,
        "mean_q": sum(node.q_value for _, node in found) / len(found),
    }
    if len(scores) > 1:
        # each tree's sum of differences from the mean: the usual sandwich for clusters of unequal size
        spread = sum(sum(value - mean for value in values) ** 2 for values in scores.values())
        error = math.sqrt(spread * len(scores) / (len(scores) - 1)) / len(found)
        result["ci"] = [mean - 1.96 * error, mean + 1.96 * error]
    return result
