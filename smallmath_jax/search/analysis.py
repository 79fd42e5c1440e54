"""What the searches show of reasoning: turning back, and steps that name a theorem (rStar-Math, section 7).

Pure functions over finished trees. What is read of a step is the preference model's first score, nothing else: a
Q-value holds the outcome too. Steps without a score (failed code; answers, where the gold answer was backed up instead)
and trees searched without a preference model count nowhere.
"""

import dataclasses
import re
import statistics

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
    """At node `at` the search left the branch of `left`, whose score fell, and won below its sibling `taken`."""

    problem_id: str
    at: str
    left: tuple[str, ...]  # tags, from the sibling given up to the step of lowest score below it
    left_scores: tuple[float | None, ...]  # None: a failed step that the search went on from
    taken: tuple[str, ...]  # tags, from the sibling taken to the answer
    taken_scores: tuple[float | None, ...]  # None also: an answer that was graded, not scored
    fall: float  # from the first score on the left branch to its lowest

    @property
    def stays_above(self) -> bool:
        """Whether no score of the branch taken is as low as the lowest of the one left; False where it has none."""
        taken = [score for score in self.taken_scores if score is not None]
        return bool(taken) and min(taken) > self.left_scores[-1]


def scored_nodes(tree: Tree) -> list[Node]:
    """The nodes that a preference model scored; none in a tree searched without one."""
    return [node for node in tree.nodes if node.score is not None]


def scored_steps(tree: Tree) -> list[Node]:
    """The scored nodes that are no answers."""
    return [node for node in scored_nodes(tree) if node.kind not in ("root", "answer")]


def backtracks(tree: Tree, min_fall: float = 0.0) -> list[Backtrack]:
    """Where a branch was followed first, its score fell, and a sibling of its first step held the answer in the end.

    The answer is the one the search settled on; where it is known to be wrong there is nothing to tell. A branch was
    followed when it was expanded before the sibling was, and its score fell when some node below it has one that is
    more than `min_fall` lower than its first step's. At each node of the winning path at most one branch counts, the
    last given up.
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
            below = [node for node in _below(one, children) if node.score is not None]
            if one.score is None or not below:
                continue
            lowest = min(below, key=lambda node: node.score)
            fall = one.score - lowest.score
            if fall > min_fall:
                left = path_to(tree, lowest.tag)[depth:]
                found.append(_backtrack(tree, left, way[depth:], fall))
                break
    return found


def _backtrack(tree: Tree, left: list[Node], taken: list[Node], fall: float) -> Backtrack:
    tags = lambda nodes: tuple(node.tag for node in nodes)
    scores = lambda nodes: tuple(node.score for node in nodes)
    return Backtrack(
        tree.problem_id, taken[0].parent, tags(left), scores(left), tags(taken), scores(taken), fall
    )


def _below(node: Node, children: dict[str, list[Node]]) -> list[Node]:
    """Every node below, in no particular order."""
    found, waiting = [], list(children[node.tag])
    while waiting:
        one = waiting.pop()
        found.append(one)
        waiting += children[one.tag]
    return found


def theorems_in(text: str) -> list[str]:
    """Names of the theorems a step names."""
    return [name for name, pattern in _PATTERNS.items() if pattern.search(text)]


def theorem_gap(tree: Tree) -> float | None:
    """How much higher its steps that name a theorem score than its others, in the mean; None where it lacks either.

    Hard problems name more theorems, so only within a tree like is compared with like.
    """
    here: tuple[list[float], list[float]] = ([], [])
    for node in scored_steps(tree):
        here[not theorems_in(node.text)].append(node.score)
    return statistics.fmean(here[0]) - statistics.fmean(here[1]) if all(here) else None
