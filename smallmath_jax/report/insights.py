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


def insights(trees: Iterable[Tree], page: Page | None = None) -> dict[str, Any]:
    """The fields `backtracking` and `theorems` of trees that pass once, one at a time."""
    turned, named = Backtracking(page=page), Theorems(page=page)
    for tree in trees:
        turned.add(tree)
        named.add(tree)
    return {"backtracking": turned.result(), "theorems": named.result()}


class Backtracking:
    """Counts the trees in which search turned back (analysis.backtracks), and tells some: the field `backtracking`.

    Only trees that a preference model scored count; `nodes` are their scored nodes, `left_out` the other trees. A tree
    counts once, by its deepest fall; `above` are those whose branch taken never scored as low as the one left did.
    Examples: answers known to be right first, then the deepest falls. `page` gives the address of a tree's page.
    """

    def __init__(self, examples: int = 6, page: Page | None = None):
        self._examples, self._page = examples, page
        names = ("trees", "nodes", "count", "right", "above", "left_out")
        self._counts = dict.fromkeys(names, 0)
        self._falls: list[float] = []
        self._found: list[tuple[tuple[bool, float], Tree, analysis.Backtrack]] = []
        self._by_round: dict[str, dict[str, int]] = defaultdict(
            lambda: {"trees": 0, "nodes": 0, "count": 0}
        )

    def add(self, tree: Tree) -> None:
        """Counts one more tree."""
        nodes = len(analysis.scored_nodes(tree))
        if not nodes:
            self._counts["left_out"] += 1
            return
        turns = analysis.backtracks(tree)
        for cell in (self._counts, self._by_round[searched_in(tree)]):
            cell["trees"] += 1
            cell["nodes"] += nodes
            cell["count"] += bool(turns)
        if not turns:
            return
        turn = max(turns, key=lambda one: one.fall)
        correct = next(n.verdict for n in tree.nodes if n.tag == tree.chosen) == "correct"
        self._falls.append(turn.fall)
        self._counts["right"] += correct
        self._counts["above"] += turn.stays_above
        found = [*self._found, ((not correct, -turn.fall), tree, turn)]
        self._found = sorted(found, key=lambda one: one[0])[: self._examples]

    def result(self) -> dict[str, Any]:
        """The field, of the trees so far."""
        result: dict[str, Any] = dict(self._counts)
        result["median_fall"] = statistics.median(self._falls) if self._falls else None
        result["examples"] = [_example(tree, turn, self._page) for _, tree, turn in self._found]
        if len(self._by_round) > 1:
            result["by_round"] = dict(sorted(self._by_round.items(), key=_round_order))
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


class Theorems:
    """The scores of steps that name a theorem against those of other steps, with examples: the field `theorems`.

    Only steps that a preference model scored count. Steps of one tree hang together: a mean is over all steps, its 95 %
    interval counts each tree as one draw (cluster-robust; none below two trees). `within` is the mean of
    analysis.theorem_gap over the `n` trees that have one. Examples: the highest scores, one a theorem.
    """

    def __init__(self, examples: int = 6, page: Page | None = None):
        self._examples, self._page = examples, page
        self._groups: dict[str, _Scores] = defaultdict(_Scores)
        self._by_name: dict[str, _Scores] = defaultdict(_Scores)
        self._best: dict[str, tuple[Node, str]] = {}  # theorem -> step, its page
        self._gaps: list[float] = []

    def add(self, tree: Tree) -> None:
        """Counts the steps of one more tree."""
        page = self._page(tree) if self._page else ""
        groups: dict[str, list[Node]] = defaultdict(list)
        by_name: dict[str, list[Node]] = defaultdict(list)
        for node in analysis.scored_steps(tree):
            named = analysis.theorems_in(node.text)
            groups["theorem" if named else "other"].append(node)
            for name in named:
                by_name[name].append(node)
                if name not in self._best or node.score > self._best[name][0].score:
                    self._best[name] = node, page
        for known, here in ((self._groups, groups), (self._by_name, by_name)):
            for name, nodes in here.items():
                known[name].add(nodes)
        gap = analysis.theorem_gap(tree)
        self._gaps += [] if gap is None else [gap]

    def result(self) -> dict[str, Any]:
        """The field, of the trees so far."""
        order = sorted(self._best, key=lambda name: -self._best[name][0].score)
        mean = statistics.fmean(self._gaps) if self._gaps else None
        return {
            "theorem": self._groups["theorem"].stat(),
            "other": self._groups["other"].stat(),
            "within": {"n": len(self._gaps), "mean": mean},
            "by_theorem": {name: found.stat() for name, found in self._by_name.items()},
            "examples": [
                _theorem_example(name, *self._best[name]) for name in order[: self._examples]
            ],
        }


def _theorem_example(name: str, node: Node, page: str) -> dict[str, Any]:
    example = _step(node) | {"theorem": name}
    return example | ({"page": f"{page}#{node.tag}"} if page else {})


class _Scores:
    """Scores of steps, added up tree by tree."""

    def __init__(self) -> None:
        self._trees: list[tuple[int, float]] = []  # (steps, sum of their scores)
        self._q_sum = 0.0

    def add(self, steps: Sequence[Node]) -> None:
        """The steps of one tree."""
        self._trees.append((len(steps), sum(node.score for node in steps)))
        self._q_sum += sum(node.q_value for node in steps)

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
