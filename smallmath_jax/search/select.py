"""From finished trees to training data: trajectories for SFT, examples for the baselines, which problems to keep.

rStar-Math, sections 3.4 and 3.5; the ablations of section 9.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from smallmath_jax.records import Node, Tree, draw_key
from smallmath_jax.search.pairs import mean_q
from smallmath_jax.search.tree import children_of
from smallmath_jax.search.vote import Ballot, Equal, group_answers

AGREEING = 3  # of 10 solutions of a synthetic problem
RIGHT_SHARE = 0.5  # of a synthetic problem's trajectories: below it the label counts as noise


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A way from the root to a leaf, the root left out."""

    problem_id: str
    steps: tuple[Node, ...]
    outcome: str  # correct | wrong | error | other (too deep, invalid, ungraded, not expanded)

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def token_ids(self) -> list[int]:
        return [token for step in self.steps for token in step.token_ids]

    @property
    def written(self) -> list[bool]:
        """Which of token_ids the policy wrote; the rest is program output, to be left out of the SFT loss or not."""
        return [place < one.written for one in self.steps for place in range(len(one.token_ids))]

    @property
    def mean_q(self) -> float:
        return mean_q(self.steps)

    @property
    def lowest_q(self) -> float:
        return min((step.q_value for step in self.steps), default=1.0)

    @property
    def answer(self) -> str | None:
        return self.steps[-1].answer if self.steps else None


def trajectories(tree: Tree) -> list[Trajectory]:
    """Every way from the root to a leaf, depth first."""
    children = children_of(tree)
    found, waiting = [], [(tree.nodes[0], ())] if tree.nodes else []
    while waiting:
        node, steps = waiting.pop()
        below = children[node.tag]
        waiting += [(child, (*steps, child)) for child in reversed(below)]
        if not below and steps:
            found.append(Trajectory(tree.problem_id, steps, _outcome(node)))
    return found


def _outcome(leaf: Node) -> str:
    if leaf.kind == "answer":
        return leaf.verdict if leaf.verdict in ("correct", "wrong") else "other"
    return "error" if leaf.kind == "error" else "other"


def finished(tree: Tree) -> list[Trajectory]:
    """The trajectories with an outcome, in the public code's order: wrong and failed ones first, then right ones.

    A tree without any graded answer gives none.
    """
    found = trajectories(tree)
    if not any(one.outcome in ("correct", "wrong") for one in found):
        return []
    wrong = [one for one in found if one.outcome in ("wrong", "error")]
    return wrong + [one for one in found if one.outcome == "correct"]


# ---- SFT data


def best_by_q(found: Sequence[Trajectory], n: int = 2) -> list[Trajectory]:
    """The n right trajectories of highest mean Q, then lowest step (rStar-Math: top 2), repetitions left out.

    A trajectory with a failed step is left out before the cut; the public code drops the ones with the word "error" in
    their text, after it (`rstar_best_by_q`).
    """
    right = [
        one
        for one in found
        if one.outcome == "correct" and not any(step.errors for step in one.steps)
    ]
    unique = {one.text: one for one in reversed(right)}  # the earliest of equals
    right = [one for one in right if unique[one.text] is one]
    return sorted(right, key=_by_q)[:n]


def rstar_best_by_q(found: Sequence[Trajectory], n: int = 2) -> list[Trajectory]:
    """The public code's choice: repetitions stay, and the word "error" drops a trajectory after the cut."""
    right = [one for one in found if one.outcome == "correct"]
    return [one for one in sorted(right, key=_by_q)[:n] if "error" not in one.text.lower()]


def _by_q(one: Trajectory) -> tuple[float, float]:
    return -one.mean_q, -one.lowest_q


def rejection(found: Sequence[Trajectory], n: int = 2, seed: int = 0) -> list[Trajectory]:
    """n right trajectories at random: rejection sampling (section 9.1)."""
    return _at_random([one for one in found if one.outcome == "correct"], n, seed)


def at_random(found: Sequence[Trajectory], n: int = 2, seed: int = 0) -> list[Trajectory]:
    """n answered trajectories at random, right or wrong: random sampling (section 9.1)."""
    return _at_random([one for one in found if one.outcome in ("correct", "wrong")], n, seed)


def _at_random(found: Sequence[Trajectory], n: int, seed: int) -> list[Trajectory]:
    if not found:
        return []
    key = draw_key(seed, found[0].problem_id, "select")
    order = np.random.default_rng(key).permutation(len(found))
    return [found[index] for index in order[:n]]


# Ablation of section 9.1: what SFT trains on. The baselines are published over plain samples: trees of
# `beam.sample_chains`, which `config.evolve.sampler` chooses.
SFT_VARIANTS: dict[str, Callable[[Sequence[Trajectory], int, int], list[Trajectory]]] = {
    "step_verified": lambda found, n, seed: best_by_q(found, n),
    "rejection": rejection,
    "random": at_random,
}


def select_sft(
    tree: Tree, variant: str = "step_verified", n: int = 2, seed: int = 0
) -> list[Trajectory]:
    """SFT trajectories of one problem. Raises ValueError for an unknown variant."""
    if variant not in SFT_VARIANTS:
        raise ValueError(f"no SFT variant {variant!r}; known: {', '.join(SFT_VARIANTS)}")
    return SFT_VARIANTS[variant](finished(tree), n, seed)


# ---- examples for the reward models of the ablation (section 9.2)


@dataclasses.dataclass(frozen=True)
class ValueExample:
    """Token ids after the prompt, and the value a reward model is to give at their end."""

    problem_id: str
    token_ids: list[int]
    value: float


def orm_examples(tree: Tree) -> list[ValueExample]:
    """Outcome reward model: every answered trajectory, 1 for right and 0 for wrong."""
    return [
        ValueExample(one.problem_id, one.token_ids, float(one.outcome == "correct"))
        for one in trajectories(tree)
        if one.outcome in ("correct", "wrong")
    ]


def pqm_examples(tree: Tree) -> list[ValueExample]:
    """Process Q model: every visited step and its Q-value, to be fitted by squared error (section 3.3.3)."""
    before: dict[str, list[int]] = {"": []}
    examples = []
    for node in tree.nodes:
        before[node.tag] = before[node.parent] + list(node.token_ids)
        if node.parent and node.visit_count:
            examples.append(ValueExample(tree.problem_id, before[node.tag], node.q_value))
    return examples


EXAMPLES = {"orm": orm_examples, "pqm": pqm_examples}
LOSSES = ("ppm", *EXAMPLES)  # what a reward model may learn by; a PPM from pairs


# ---- problems


def difficulty(trees: Iterable[Tree]) -> str:
    """easy: all answers right; medium: some; hard: none (no answer at all included). Of all trees of one problem."""
    counts = Counter(node.verdict for tree in trees for node in tree.nodes if node.kind == "answer")
    if not counts["correct"]:
        return "hard"
    return "medium" if counts["wrong"] else "easy"


def right_share(trees: Iterable[Tree]) -> float | None:
    """Share of right ones among the graded answers of a problem's trees; None without any."""
    verdicts = [node.verdict for tree in trees for node in tree.nodes if node.kind == "answer"]
    right, wrong = verdicts.count("correct"), verdicts.count("wrong")
    return right / (right + wrong) if right + wrong else None


def label_noise(trees: Iterable[Tree], threshold: float = RIGHT_SHARE) -> bool:
    """Whether a synthetic problem's label is to be mistrusted: less than `threshold` of its trajectories are right.

    Without any answer it is: of the problems nobody solved, 19 of 20 had a wrong label (section 6.3.1).
    """
    share = right_share(trees)
    return share is None or share < threshold


def agreed_answer(
    answers: Sequence[str | None], equal: Equal, agreeing: int = AGREEING
) -> str | None:
    """The label of a synthetic problem: the answer that at least `agreeing` of its solutions share, else None.

    Two answers that share the lead agree with nobody: None.
    """
    groups = group_answers([Ballot(answer) for answer in answers if answer], equal)
    groups.sort(key=len, reverse=True)
    if not groups or len(groups[0]) < agreeing:
        return None
    tied = len(groups) > 1 and len(groups[1]) == len(groups[0])
    return None if tied else groups[0][0].answer


def counts_of(group: Sequence[Tree]) -> Counter[str]:
    """What the trees of one problem add to the `summary` of a round."""
    return Counter(
        {
            "problems": 1,
            difficulty(group): 1,
            "failed": sum(tree.stopped == "failed" for tree in group),
            "rollouts": sum(tree.rollouts for tree in group),
            "wasted": sum(tree.wasted for tree in group),
            "tokens": sum(tree.tokens for tree in group),
            "tokens_saved": sum(tree.extra.get("tokens_saved", 0) for tree in group),
            "nodes": sum(len(tree.nodes) for tree in group),
        }
    )


def summary_of(counts: Mapping[str, int]) -> dict[str, Any]:
    """A round's problems by difficulty, their share with a right answer (coverage), and cost, of added `counts_of`."""
    known = Counter(counts)
    solved = known["problems"] - known["hard"]
    return {
        "problems": known["problems"],
        **{name: known[name] for name in ("easy", "medium", "hard")},
        "coverage": solved / known["problems"] if known["problems"] else 0.0,
        **{name: known[name] for name in ("failed", "rollouts", "wasted", "tokens")},
        **{name: known[name] for name in ("tokens_saved", "nodes")},
    }


def summary(groups: Iterable[Sequence[Tree]]) -> dict[str, Any]:
    """`summary_of` the trees of each problem; they pass one problem at a time."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts.update(counts_of(group))
    return summary_of(counts)
