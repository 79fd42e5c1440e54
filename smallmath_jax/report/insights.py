"""What a run's search trees tell: where search backtracked, and how steps that apply a theorem are scored.

Both return the shape of their field in WORKDIR/evolution.json (report/evolution.py).
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from smallmath_jax.records import Node, Tree

# What a step says when it applies a theorem: the paper's five (section 5) and others of school competitions.
THEOREMS = {
    "Fermat's little theorem": r"\bfermat",
    "Vieta's formulas": r"\bvieta",
    "AM-GM inequality": r"\bam[\s–-]?gm\b",
    "Pythagorean theorem": r"\bpythagor",
    "shoelace formula": r"\bshoelace",
    "Cauchy-Schwarz inequality": r"\bcauchy[\s–-]+schwar",
    "Chinese remainder theorem": r"\bchinese remainder",
    "remainder or factor theorem": r"\b(polynomial remainder|factor) theorem",
    "Euler's theorem": r"\beuler'?s? (totient|theorem|phi)",
    "law of cosines or sines": r"\b(law of (co)?sines?|(co)?sine rule)",
    "Heron's formula": r"\bheron",
    "binomial theorem": r"\bbinomial theorem",
    "inclusion-exclusion": r"\binclusion[\s–-]+exclusion",
    "pigeonhole principle": r"\bpigeonhole",
    "power of a point": r"\bpower of a point",
}
LONGEST_PATH = 4  # steps of an example's branch that are shown


class Turn(NamedTuple):
    """Where search left one branch for its sibling: their first steps, and how far the left one's score fell."""

    left: Node
    taken: Node
    fall: float


def backtracking(
    trees: Iterable[Tree], examples: int = 6, page: Callable[[Tree], str] | None = None
) -> dict[str, Any]:
    """Counts the trees whose chosen path begins, somewhere, at a step that search only tried second (paper, figure 4).

    Of two siblings s and t, t on the chosen path: s was expanded before t was (or before t answered), no child of s
    scored as high as s itself, and t or a step below it on the path scores higher than anything directly below s.
    Trees without a chosen answer or without scores count among `trees` only. Examples: right answers first, then the
    deepest falls. `page` gives the address of a tree's page for the link.
    """
    count, right, by_round, found = 0, 0, defaultdict(lambda: {"trees": 0, "count": 0}), []
    total = 0
    for tree in trees:
        total += 1
        by_round[str(tree.round)]["trees"] += 1
        turn = find_turn(tree)
        if turn is None:
            continue
        count += 1
        by_round[str(tree.round)]["count"] += 1
        correct = next(n.verdict for n in tree.nodes if n.tag == tree.chosen) == "correct"
        right += correct
        found.append(((not correct, -turn.fall), tree, turn))
        found = sorted(found, key=lambda one: one[0])[:examples]  # a stream of trees need not fit
    result: dict[str, Any] = {"trees": total, "count": count, "right": right}
    result["examples"] = [_example(tree, turn, page) for _, tree, turn in found]
    if len(by_round) > 1:
        result["by_round"] = dict(sorted(by_round.items(), key=lambda item: int(item[0])))
    return result


def find_turn(tree: Tree) -> Turn | None:
    """The deepest fall that a tree's chosen path turned away from; None when it never did."""
    places = {node.tag: place for place, node in enumerate(tree.nodes)}
    below: dict[str, list[Node]] = defaultdict(list)
    for node in tree.nodes:
        if node.tag != "0":
            below[node.parent].append(node)
    expanded = {tag: min(places[child.tag] for child in found) for tag, found in below.items()}
    path = _path(tree)
    turns = []
    for depth, taken in enumerate(path[1:], 1):
        # an answer is reached when it is made; every other step when its children are
        reached = expanded.get(taken.tag, places[taken.tag])
        ahead = [node.score for node in path[depth:] if node.score is not None]
        for left in below[taken.parent]:
            scores = [n.score for n in below.get(left.tag, ()) if n.score is not None]
            if left.tag == taken.tag or left.score is None or not scores or not ahead:
                continue
            fall = left.score - max(scores)
            if expanded[left.tag] < reached and fall > 0 and max(ahead) > max(scores):
                turns.append(Turn(left, taken, fall))
    return max(turns, key=lambda turn: turn.fall, default=None)


def _path(tree: Tree) -> list[Node]:
    """Nodes from the root to the chosen answer; empty without one."""
    by_tag = {node.tag: node for node in tree.nodes}
    path = []
    tag = tree.chosen
    while tag in by_tag:
        path.append(by_tag[tag])
        tag = by_tag[tag].parent
    return path[::-1]


def _example(tree: Tree, turn: Turn, page: Callable[[Tree], str] | None) -> dict[str, Any]:
    path = _path(tree)
    place = path.index(turn.taken)
    answer = path[-1].answer
    example = {
        "problem_id": tree.problem_id,
        "problem": tree.problem,
        "gold": tree.gold,
        "answer": "" if answer is None else answer,
        "prefix": [_step(node) for node in path[1:place]][-LONGEST_PATH:],
        "left": [_step(node) for node in _explored(tree, turn.left)],
        "taken": [_step(node) for node in path[place:]][:LONGEST_PATH],
        "images": list(tree.images),
    }
    return example | ({"page": f"{page(tree)}#{turn.left.tag}"} if page else {})


def _explored(tree: Tree, node: Node) -> list[Node]:
    """A step and the best-scored steps below it."""
    chain = [node]
    while len(chain) < LONGEST_PATH:
        scored = [n for n in tree.nodes if n.parent == chain[-1].tag and n.score is not None]
        if not scored:
            break
        chain.append(max(scored, key=lambda n: n.score))
    return chain


def _step(node: Node) -> dict[str, Any]:
    return {"tag": node.tag, "text": node.text, "score": node.score}


def theorem_scores(
    trees: Iterable[Tree], theorems: Mapping[str, str] = THEOREMS, examples: int = 6
) -> dict[str, Any]:
    """Preference-model scores and Q-values of steps whose text names a theorem, against those of all other steps.

    Steps of one tree hang together: a mean is over all steps, its 95 % interval counts each tree as one draw
    (cluster-robust; none below two trees). Steps that failed, were not scored or not visited stay out. Examples: the
    highest scores, one a theorem.
    """
    patterns = {name: re.compile(pattern, re.I) for name, pattern in theorems.items()}
    groups: dict[str, list[tuple[int, Node]]] = defaultdict(list)
    for number, tree in enumerate(trees):
        for node in tree.nodes:
            if node.kind not in ("open", "answer") or node.score is None or not node.visit_count:
                continue
            named = [name for name, pattern in patterns.items() if pattern.search(node.text)]
            groups["theorem" if named else "other"].append((number, node))
            for name in named:
                groups[f"by {name}"].append((number, node))
    by_theorem = {name: groups[f"by {name}"] for name in patterns if groups.get(f"by {name}")}
    best = {name: max(found, key=lambda one: one[1].score)[1] for name, found in by_theorem.items()}
    order = sorted(best, key=lambda name: -best[name].score)[:examples]
    return {
        "theorem": _stat(groups["theorem"]),
        "other": _stat(groups["other"]),
        "by_theorem": {name: _stat(found) for name, found in by_theorem.items()},
        "examples": [_step(best[name]) | {"theorem": name} for name in order],
    }


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
