"""Preference pairs for the process preference model, out of finished trees (rStar-Math, section 3.3.2).

For a step in the middle: siblings, the two of highest Q that led to a right answer against the two of lowest Q that led
to a wrong one. For the final step: whole trajectories. The rules of siblings are those of the public code; its data
files hold trajectory pairs too, its extraction makes none.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from smallmath_jax.records import Node, PreferencePair, Tree
from smallmath_jax.search.tree import children_of

DESCEND = ("all", "vis_count")


@dataclasses.dataclass(frozen=True)
class PairSettings:
    """Which pairs are made.

    min_margin, min_edit: the filter of the public code; the paper has none. Kept by default: Q-values of few visits
        order near-equal steps by chance, and two texts that hardly differ teach punctuation. 0 turns each off (short
        steps, as in small problem sets, need a smaller min_edit).
    trajectories: also pairs of whole trajectories for the final step (paper).
    descend: "all" children with right and wrong answers below, or only the most visited of them ("vis_count").
    max_tokens: a pair with a longer side, prompt included, is dropped whole and counted; the public code cuts off its
        end, after which both sides may be the same.
    """

    min_margin: float = 0.5  # of the two Q-values
    min_edit: int = 20  # characters
    trajectories: bool = True
    descend: str = "all"
    max_tokens: int = 2048
    per_side: int = 2

    def __post_init__(self) -> None:
        if self.descend not in DESCEND:
            raise ValueError(f"pairs.descend={self.descend!r}: known are {', '.join(DESCEND)}")
        if self.per_side < 1 or self.max_tokens < 1:
            raise ValueError("pairs.per_side and pairs.max_tokens must be at least 1")


class StepPair(NamedTuple):
    """Two siblings, before any filter. `positives` and `negatives` are the sizes of the sets they were taken from."""

    chosen: Node
    rejected: Node
    margin: float
    continued_margin: float  # of the mean Q along the best and the worst way on
    positives: int
    negatives: int


class Outcomes(NamedTuple):
    """Answers below a node, its own included."""

    right: int
    wrong: int


def preference_pairs(
    tree: Tree, settings: PairSettings = PairSettings(), prompt_tokens: int = 0
) -> tuple[list[PreferencePair], dict[str, int]]:
    """All pairs of a tree, and counts: made ("step", "trajectory") and dropped ("margin", "edit", "too_long",
    "identical").

    A tree without both right and wrong answers gives none. Counts of a pair's set are those before the filters, as in
    the public code, so that a set of four weighs no more when one of it is dropped.
    """
    counts: Counter[str] = Counter()
    pairs = []
    by_tag = {node.tag: node for node in tree.nodes}
    for found in step_pairs(tree, settings):
        reason = _dull(found, settings)
        if reason:
            counts[reason] += 1
            continue
        prefix = _ids(_path(by_tag, by_tag[found.chosen.parent]))
        pairs.append(
            PreferencePair(
                problem_id=tree.problem_id,
                prefix_ids=prefix,
                chosen_ids=list(found.chosen.token_ids),
                rejected_ids=list(found.rejected.token_ids),
                positives=found.positives,
                negatives=found.negatives,
                margin=found.margin,
                kind="step",
                chosen=found.chosen.text,
                rejected=found.rejected.text,
            )
        )
    if settings.trajectories:
        pairs += trajectory_pairs(tree, settings.per_side)
    kept = []
    for pair in pairs:
        reason = _unusable(pair, settings, prompt_tokens)
        counts[reason or pair.kind] += 1
        kept += [] if reason else [pair]
    return kept, dict(counts)


def step_pairs(tree: Tree, settings: PairSettings = PairSettings()) -> list[StepPair]:
    """Sibling pairs by the public code's rules, before margin and edit distance, breadth first.

    At each node: children with right answers below by falling Q, children with wrong ones below by rising Q, the first
    two of each; with one on a side, up to four of the other. A pair counts when both its own Q and the mean Q of its
    continuations say so. Below a node where a side is empty nothing is looked at.
    """
    children, below = children_of(tree), outcomes(tree)
    few, many = settings.per_side, 2 * settings.per_side
    pairs: list[StepPair] = []
    waiting = tree.nodes[:1]
    while waiting:
        siblings = children[waiting.pop(0).tag]
        right = sorted((one for one in siblings if below[one.tag].right), key=_falling)
        wrong = sorted((one for one in siblings if below[one.tag].wrong), key=_rising)
        chosen, rejected = right[:few], wrong[:few]
        if not chosen or not rejected:
            continue
        if len(chosen) == 1:
            rejected = wrong[:many]
        if len(rejected) == 1:
            chosen = right[:many]
        for one in chosen:
            for other in rejected:
                margin = one.q_value - other.q_value
                best = _continued(one, children, below, best=True)
                worst = _continued(other, children, below, best=False)
                if margin > 0 and best > worst:
                    counts = len(chosen), len(rejected)
                    pairs.append(StepPair(one, other, margin, best - worst, *counts))
        mixed = [one for one in siblings if all(below[one.tag])]
        if settings.descend == "vis_count":
            mixed = sorted(mixed, key=lambda one: -one.visit_count)[:1]
        waiting += mixed
    return pairs


def trajectory_pairs(tree: Tree, per_side: int = 2) -> list[PreferencePair]:
    """Whole trajectories for the final step: the right ones of highest mean Q against the wrong ones of lowest."""
    by_tag = {node.tag: node for node in tree.nodes}
    right, wrong = [], []
    for node in tree.nodes:
        side = {"correct": right, "wrong": wrong}.get(node.verdict if node.kind == "answer" else "")
        if side is not None:
            side.append(_path(by_tag, node))
    right = sorted(right, key=lambda steps: -mean_q(steps))[:per_side]
    wrong = sorted(wrong, key=mean_q)[:per_side]
    return [
        PreferencePair(
            problem_id=tree.problem_id,
            prefix_ids=[],
            chosen_ids=_ids(good),
            rejected_ids=_ids(bad),
            positives=len(right),
            negatives=len(wrong),
            margin=mean_q(good) - mean_q(bad),
            kind="trajectory",
            chosen="".join(step.text for step in good),
            rejected="".join(step.text for step in bad),
        )
        for good in right
        for bad in wrong
    ]


def outcomes(tree: Tree) -> dict[str, Outcomes]:
    """tag -> right and wrong answers at or below it. Ungraded answers and failures count as neither."""
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for node in reversed(tree.nodes):  # children come after their parents
        if node.kind == "answer":
            right[node.tag] += node.verdict == "correct"
            wrong[node.tag] += node.verdict == "wrong"
        right[node.parent] += right[node.tag]
        wrong[node.parent] += wrong[node.tag]
    return {node.tag: Outcomes(right[node.tag], wrong[node.tag]) for node in tree.nodes}


def mean_q(steps: Sequence[Node]) -> float:
    """Mean Q-value of a trajectory's steps, the answer included."""
    return sum(step.q_value for step in steps) / len(steps) if steps else 0.0


def edit_distance(first: str, second: str, limit: int | None = None) -> int:
    """Levenshtein distance of two texts in characters.

    With a limit, a distance above it comes out as some number above it, and only the band around the diagonal that a
    distance within it can pass is computed.
    """
    if len(first) < len(second):
        first, second = second, first
    band = len(first) if limit is None else limit
    if len(first) - len(second) > band:
        return len(first) - len(second)
    far = len(first) + 1
    row = list(range(len(second) + 1))
    for index, character in enumerate(first, 1):
        low, high = max(1, index - band), min(len(second), index + band)
        diagonal, row[low - 1] = row[low - 1], index if low == 1 else far
        for place in range(low, high + 1):
            above = row[place] if place < index + band else far
            changed = diagonal + (character != second[place - 1])
            diagonal = row[place]
            row[place] = min(above + 1, row[place - 1] + 1, changed)
        if min(row[low - 1 : high + 1]) > band:
            return band + 1
    return row[-1]


def _falling(node: Node) -> float:
    return -node.q_value


def _rising(node: Node) -> float:
    return node.q_value


def _continued(
    node: Node, children: dict[str, list[Node]], below: dict[str, Outcomes], best: bool
) -> float:
    """Mean Q from a node down: always to the child of highest Q that leads to a right answer, or the other way."""
    steps = [node]
    while True:
        side = 0 if best else 1
        ways = [one for one in children[steps[-1].tag] if below[one.tag][side]]
        if not ways:
            return mean_q(steps)
        steps.append(min(ways, key=_falling if best else _rising))


def _dull(pair: StepPair, settings: PairSettings) -> str:
    """Why a sibling pair teaches too little, or ""."""
    if pair.margin < settings.min_margin:
        return "margin"
    limit = settings.min_edit
    near = limit > 0 and edit_distance(pair.rejected.text, pair.chosen.text, limit) < limit
    return "edit" if near else ""


def _unusable(pair: PreferencePair, settings: PairSettings, prompt_tokens: int) -> str:
    if pair.chosen == pair.rejected or (
        pair.chosen_ids == pair.rejected_ids and (pair.chosen_ids or not pair.chosen)
    ):
        return "identical"
    longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
    too_long = prompt_tokens + len(pair.prefix_ids) + longest > settings.max_tokens
    return "too_long" if too_long else ""


def _path(by_tag: dict[str, Node], node: Node) -> list[Node]:
    """The steps down to a node, the root left out."""
    steps = []
    while node.parent:
        steps.append(node)
        node = by_tag[node.parent]
    return steps[::-1]


def _ids(steps: Sequence[Node]) -> list[int]:
    return [token for step in steps for token in step.token_ids]
