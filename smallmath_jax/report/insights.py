"""What search.analysis finds in trees, in the shapes that a self-evolution run's report shows (report/evolution.py)."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from smallmath_jax.records import Node, Tree
from smallmath_jax.search import analysis

LONGEST_PATH = 4  # steps of an example's branch that are shown


def backtracking(
    trees: Iterable[Tree], examples: int = 6, page: Callable[[Tree], str] | None = None
) -> dict[str, Any]:
    """Counts the trees in which search turned back (analysis.backtracks), and tells some: the field `backtracking`.

    A tree counts once, by its deepest fall. Examples: answers known to be right first, then the deepest falls. `page`
    gives the address of a tree's page for the link.
    """
    total, count, right, found = 0, 0, 0, []
    by_round: dict[str, dict[str, int]] = defaultdict(lambda: {"trees": 0, "count": 0})
    for tree in trees:
        total += 1
        by_round[str(tree.round)]["trees"] += 1
        turns = analysis.backtracks(tree)
        if not turns:
            continue
        turn = max(turns, key=lambda one: one.fall)
        correct = next(n.verdict for n in tree.nodes if n.tag == tree.chosen) == "correct"
        count, right = count + 1, right + correct
        by_round[str(tree.round)]["count"] += 1
        found.append(((not correct, -turn.fall), tree, turn))
        found = sorted(found, key=lambda one: one[0])[:examples]  # a stream of trees need not fit
    result: dict[str, Any] = {"trees": total, "count": count, "right": right}
    result["examples"] = [_example(tree, turn, page) for _, tree, turn in found]
    if len(by_round) > 1:
        result["by_round"] = dict(sorted(by_round.items(), key=lambda item: int(item[0])))
    return result


def _example(
    tree: Tree, turn: analysis.Backtrack, page: Callable[[Tree], str] | None
) -> dict[str, Any]:
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
    return {"tag": node.tag, "text": node.text, "score": analysis.step_value(node)}


def theorems(trees: Sequence[Tree], examples: int = 6) -> dict[str, Any]:
    """analysis.theorem_scores with intervals and examples: the field `theorems`.

    Steps of one tree hang together: a mean is over all steps, its 95 % interval counts each tree as one draw
    (cluster-robust; none below two trees). Examples: the highest scores, one a theorem.
    """
    groups: dict[str, list[tuple[int, Node]]] = defaultdict(list)
    by_name: dict[str, list[tuple[int, Node]]] = defaultdict(list)
    for number, tree in enumerate(trees):
        for node in tree.nodes:
            if node.kind in ("root", "answer") or (node.score is None and not node.visit_count):
                continue
            named = analysis.theorems_in(node.text)
            groups["theorem" if named else "other"].append((number, node))
            for name in named:
                by_name[name].append((number, node))
    value = lambda one: analysis.step_value(one[1])
    best = {name: max(found, key=value)[1] for name, found in by_name.items()}
    order = sorted(best, key=lambda name: -analysis.step_value(best[name]))[:examples]
    return {
        "theorem": _stat(groups["theorem"]),
        "other": _stat(groups["other"]),
        "within": analysis.theorem_scores(trees)["within"],
        "by_theorem": {name: _stat(found) for name, found in by_name.items()},
        "examples": [_step(best[name]) | {"theorem": name} for name in order],
    }


def _stat(found: list[tuple[int, Node]]) -> dict[str, Any]:
    """{"n", "trees", "mean_score", "mean_q", "ci"} of (tree, step)s."""
    if not found:
        return {"n": 0, "trees": 0}
    scores: dict[int, list[float]] = defaultdict(list)
    for number, node in found:
        scores[number].append(analysis.step_value(node))
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
