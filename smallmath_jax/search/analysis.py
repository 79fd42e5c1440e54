"""What the searches show of reasoning: turning back, and steps that name a theorem (rStar-Math, section 7).

Pure functions over finished trees. The value of a step is the preference model's first score, or its Q-value where
none was given.
"""

import dataclasses
import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from smallmath_jax.records import Node, Tree
from smallmath_jax.search.tree import children_of, path_to

# Theorems of section 7.2, and their near relations, as a step's comment would name them.
THEOREMS = {
    "Fermat's little theorem": r"fermat['\u2019]?s?\s+(?:little\s+)?theorem",
    "Vieta's formulas": r"vieta",
    "AM-GM inequality": r"\bam\s*[-\u2013]\s*gm\b|arithmetic[- ](?:mean|geometric)[- \w]*inequality",
    "Pythagorean theorem": r"pythagor",
    "Shoelace theorem": r"shoe\s?lace",
    "Euler's theorem": r"euler['\u2019]?s?\s+(?:totient\s+)?theorem",
    "Chinese remainder theorem": r"chinese\s+remainder|\bcrt\b",
    "Cauchy-Schwarz inequality": r"cauchy[- ]schwarz",
    "Law of cosines or sines": r"law\s+of\s+(?:co)?sines|(?:co)?sine\s+(?:rule|law)",
    "Binomial theorem": r"binomial\s+theorem",
    "Heron's formula": r"heron['\u2019]?s?\s+formula",
    "Remainder theorem": r"(?<!chinese )(?:polynomial\s+)?remainder\s+theorem|factor\s+theorem",
}
_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in THEOREMS.items()}


@dataclasses.dataclass(frozen=True)
class Backtrack:
    """At node `at` the search left the branch of `left`, whose value fell, and won below its sibling `taken`."""

    problem_id: str
    at: str
    left: tuple[str, ...]  # tags, from the sibling given up to the step of lowest value below it
    left_values: tuple[float, ...]
    taken: tuple[str, ...]  # tags, from the sibling taken to the answer
    taken_values: tuple[float, ...]
    fall: float  # from the first value on the left branch to its lowest


def step_value(node: Node) -> float:
    return node.q_value if node.score is None else node.score


def backtracks(tree: Tree, min_fall: float = 0.0) -> list[Backtrack]:
    """Where a branch was followed first, lost value, and a sibling of its first step held the answer in the end.

    The answer is the one the search settled on; where it is known to be wrong there is nothing to tell. A branch was
    followed when it was expanded before the sibling was, and its value fell when some step below it is worth at least
    `min_fall` less than its first. At each node of the winning path at most one branch counts, the last given up.
    """
    if not tree.chosen:
        return []
    way = path_to(tree, tree.chosen)
    if way[-1].verdict == "wrong":
        return []
    children = children_of(tree)
    place = {node.tag: index for index, node in enumerate(tree.nodes)}
    expanded = {tag: place[below[0].tag] for tag, below in children.items() if below}
    found = []
    for depth, step in enumerate(way):
        turn = expanded.get(step.tag, place[step.tag])
        earlier = [
            one
            for one in children[step.parent]
            if one.tag != step.tag and expanded.get(one.tag, turn) < turn
        ]
        for one in sorted(earlier, key=lambda one: -expanded[one.tag]):
            lowest = min(_below(one, children), key=step_value)
            fall = step_value(one) - step_value(lowest)
            if fall > min_fall:
                left = path_to(tree, lowest.tag)[depth:]
                found.append(_backtrack(tree, left, way[depth:], fall))
                break
    return found


def _backtrack(tree: Tree, left: list[Node], taken: list[Node], fall: float) -> Backtrack:
    tags = lambda nodes: tuple(node.tag for node in nodes)
    values = lambda nodes: tuple(map(step_value, nodes))
    return Backtrack(
        tree.problem_id, taken[0].parent, tags(left), values(left), tags(taken), values(taken), fall
    )


def _below(node: Node, children: dict[str, list[Node]]) -> list[Node]:
    """Every node below, in no particular order; the node itself where there is none."""
    found, waiting = [], list(children[node.tag])
    while waiting:
        one = waiting.pop()
        found.append(one)
        waiting += children[one.tag]
    return found or [node]


def theorems_in(text: str) -> list[str]:
    """Names of the theorems a step names."""
    return [name for name, pattern in _PATTERNS.items() if pattern.search(text)]


def theorem_scores(trees: Sequence[Tree]) -> dict[str, Any]:
    """Values of steps that name a theorem against all others.

    Returns n and mean of "naming" steps, of "others", "by_theorem", and "within": the mean over trees of (mean of
    naming steps - mean of others), for trees that have both. Hard problems name more theorems, so only "within"
    compares like with like. Means of nothing are None. Answers, and unvisited steps without a score, are left out.
    """
    naming: list[float] = []
    others: list[float] = []
    within: list[float] = []
    by_name: dict[str, list[float]] = {name: [] for name in THEOREMS}
    for tree in trees:
        steps = list(valued_steps(tree))
        here = [
            [value for _, names, value in steps if bool(names) is named] for named in (True, False)
        ]
        for _, names, value in steps:
            for name in names:
                by_name[name].append(value)
        naming += here[0]
        others += here[1]
        if all(here):
            within.append(statistics.fmean(here[0]) - statistics.fmean(here[1]))
    return {
        "naming": _mean(naming),
        "others": _mean(others),
        "within": _mean(within),
        "by_theorem": {name: _mean(values) for name, values in by_name.items() if values},
    }


def valued_steps(tree: Tree) -> Iterator[tuple[Node, list[str], float]]:
    """(step, theorems it names, its value) of the steps that have one and are no answers."""
    for node in tree.nodes:
        if node.kind in ("root", "answer") or (node.score is None and not node.visit_count):
            continue
        yield node, theorems_in(node.text), step_value(node)


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"n": len(values), "mean": statistics.fmean(values) if values else None}
