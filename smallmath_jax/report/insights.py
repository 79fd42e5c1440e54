"""What search.analysis finds in trees, in the shapes that a self-evolution run's report shows (report/evolution.py)."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from smallmath_jax.records import Node, Tree
from smallmath_jax.search import analysis

LONGEST_PATH = 4  # steps of an example's branch that are shown


def insights(trees: Iterable[Tree]) -> dict[str, Any]:
    """The fields `backtracking` and `theorems` of trees that pass once, one at a time."""
    turned, named = Backtracking(), Theorems()
    for tree in trees:
        turned.add(tree)
        named.add(tree)
    return {"backtracking": turned.result(), "theorems": named.result()}


class Backtracking:
    """Counts the trees in which search turned back (analysis.backtracks), and tells some: the field `backtracking`.

    A tree counts once, by its deepest fall. Examples: answers known to be right first, then the deepest falls. `page`
    gives the address of a tree's page for the link.
    """

    def __init__(self, examples: int = 6, page: Callable[[Tree], str] | None = None):
        self._examples, self._page = examples, page
        self._total = self._count = self._right = 0
        self._found: list[tuple[tuple[bool, float], Tree, analysis.Backtrack]] = []
        self._by_round: dict[str, dict[str, int]] = defaultdict(lambda: {"trees": 0, "count": 0})

    def add(self, tree: Tree) -> None:
        """Counts one more tree."""
        self._total += 1
        self._by_round[str(tree.round)]["trees"] += 1
        turns = analysis.backtracks(tree)
        if not turns:
            return
        turn = max(turns, key=lambda one: one.fall)
        correct = next(n.verdict for n in tree.nodes if n.tag == tree.chosen) == "correct"
        self._count, self._right = self._count + 1, self._right + correct
        self._by_round[str(tree.round)]["count"] += 1
        found = [*self._found, ((not correct, -turn.fall), tree, turn)]
        self._found = sorted(found, key=lambda one: one[0])[: self._examples]

    def result(self) -> dict[str, Any]:
        """The field, of the trees so far."""
        result: dict[str, Any] = {"trees": self._total, "count": self._count, "right": self._right}
        result["examples"] = [_example(tree, turn, self._page) for _, tree, turn in self._found]
        if len(self._by_round) > 1:
            result["by_round"] = dict(sorted(self._by_round.items(), key=lambda item: int(item[0])))
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


class Theorems:
    """Values of steps that name a theorem against all others, with intervals and examples: the field `theorems`.

    Steps of one tree hang together: a mean is over all steps, its 95 % interval counts each tree as one draw
    (cluster-robust; none below two trees). `within` is analysis.theorem_scores' difference inside a tree. Examples: the
    highest values, one a theorem.
    """

    def __init__(self, examples: int = 6):
        self._examples = examples
        self._groups: dict[str, _Values] = defaultdict(_Values)
        self._by_name: dict[str, _Values] = defaultdict(_Values)
        self._best: dict[str, Node] = {}
        self._within: list[float] = []

    def add(self, tree: Tree) -> None:
        """Counts the steps of one more tree."""
        groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
        by_name: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for node, names, value in analysis.valued_steps(tree):
            groups["theorem" if names else "other"].append((value, node.q_value))
            for name in names:
                by_name[name].append((value, node.q_value))
                best = self._best.get(name)
                if best is None or value > analysis.step_value(best):
                    self._best[name] = node
        for known, here in ((self._groups, groups), (self._by_name, by_name)):
            for name, values in here.items():
                known[name].add(values)
        if len(groups) == 2:
            naming, others = ([value for value, _ in groups[name]] for name in ("theorem", "other"))
            self._within.append(statistics.fmean(naming) - statistics.fmean(others))

    def result(self) -> dict[str, Any]:
        """The field, of the trees so far."""
        order = sorted(self._best, key=lambda name: -analysis.step_value(self._best[name]))
        mean = statistics.fmean(self._within) if self._within else None
        return {
            "theorem": self._groups["theorem"].stat(),
            "other": self._groups["other"].stat(),
            "within": {"n": len(self._within), "mean": mean},
            "by_theorem": {name: found.stat() for name, found in self._by_name.items()},
            "examples": [
                _step(self._best[name]) | {"theorem": name} for name in order[: self._examples]
            ],
        }


class _Values:
    """Values of steps, added up tree by tree."""

    def __init__(self) -> None:
        self._trees: list[tuple[int, float]] = []  # (steps, sum of their values)
        self._q_sum = 0.0

    def add(self, values: Sequence[tuple[float, float]]) -> None:
        """(value, Q-value) of the steps of one tree."""
        self._trees.append((len(values), sum(value for value, _ in values)))
        self._q_sum += sum(q_value for _, q_value in values)

    def stat(self) -> dict[str, Any]:
        """{"n", "trees", "mean_score", "mean_q", "ci"}."""
        count = sum(steps for steps, _ in self._trees)
        if not count:
            return {"n": 0, "trees": 0}
        mean = sum(total for _, total in self._trees) / count
        trees = len(self._trees)
        result = {"n": count, "trees": trees, "mean_score": mean, "mean_q": self._q_sum / count}
        if trees > 1:
            # each tree's sum of differences from the mean: the usual sandwich for clusters of unequal size
            spread = sum((total - steps * mean) ** 2 for steps, total in self._trees)
            error = math.sqrt(spread * trees / (trees - 1)) / count
            result["ci"] = [mean - 1.96 * error, mean + 1.96 * error]
        return result
