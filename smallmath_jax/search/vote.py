"""From many answers to one: votes, the answer a tree settles on, and when further rollouts cannot change it.

Answers are compared by a callable `equal(a, b)` that is passed in. rStar-Math, section 3 and its test protocol.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from smallmath_jax.records import Tree
from smallmath_jax.search.settings import TEST_TOP_K, SearchSettings
from smallmath_jax.search.tree import LiveNode, LiveTree, path_to, q_value

Equal = Callable[[str, str], bool]


@dataclasses.dataclass(frozen=True)
class Ballot:
    """One answer that votes."""

    answer: str
    score: float = 0.0  # the preference model's, in [-1, 1]
    log_prob: float = 0.0  # the policy's, summed over the trajectory
    tokens: int = 1  # it was summed over
    tag: str = ""  # the answer node


class Tally(NamedTuple):
    """A group of equal answers. `answer` is that of its best ballot."""

    answer: str
    weight: float
    count: int
    ballots: tuple[Ballot, ...]


# Weights of one ballot. "weighted" maps a score from [-1, 1] to [0, 1]: with the raw score of the public code
# ("weighted_raw") an answer of negative score loses by every further vote it gets.
WEIGHTS: dict[str, Callable[[Ballot], float]] = {
    "majority": lambda ballot: 1.0,
    "weighted": lambda ballot: (1.0 + ballot.score) / 2.0,
    "weighted_raw": lambda ballot: ballot.score,
    "likelihood": lambda ballot: math.exp(ballot.log_prob / max(ballot.tokens, 1)),
}
RULES = (*WEIGHTS, "best")


def vote(ballots: Sequence[Ballot], equal: Equal, rule: str = "majority") -> list[Tally]:
    """Groups of equal answers, the winner first.

    majority counts; weighted sums PPM scores; likelihood sums the policy's probability a token; best takes the highest
    PPM score. Ties: the higher sum of scores, then the earlier ballot. Raises ValueError for another rule.
    """
    if rule not in RULES:
        raise ValueError(f"no vote {rule!r}; known: {', '.join(RULES)}")
    tallies = []
    for group in group_answers(ballots, equal):
        best = max(group, key=lambda ballot: ballot.score)
        weight = best.score if rule == "best" else sum(map(WEIGHTS[rule], group))
        tallies.append(Tally(best.answer, weight, len(group), tuple(group)))
    scores = lambda tally: sum(ballot.score for ballot in tally.ballots)
    return sorted(tallies, key=lambda tally: (-tally.weight, -scores(tally)))


def group_answers(ballots: Iterable[Ballot], equal: Equal) -> list[list[Ballot]]:
    """Ballots of equal answers together, in the order of their first members; compared with first members only."""
    groups: list[list[Ballot]] = []
    for ballot in ballots:
        home = next((one for one in groups if _same(one[0].answer, ballot.answer, equal)), None)
        groups.append([ballot]) if home is None else home.append(ballot)
    return groups


def _same(first: str, second: str, equal: Equal) -> bool:
    return first == second or equal(first, second)


def pairwise_votes(
    answers: Sequence[str], scores: Sequence[float], equal: Equal
) -> list[tuple[int, float]]:
    """(votes, sum of scores) of each answer, every pair compared, as the public code counts them."""
    votes = []
    for answer in answers:
        agreeing = [
            score for other, score in zip(answers, scores, strict=True) if equal(answer, other)
        ]
        votes.append((len(agreeing), sum(agreeing)))
    return votes


def published_vote(
    ballots: Sequence[Ballot], equal: Equal, top_k: int = TEST_TOP_K, rule: str = "majority"
) -> list[Tally]:
    """The published test protocol: of one ballot a search, the top k by PPM score vote."""
    best = sorted(ballots, key=lambda ballot: -ballot.score)[:top_k]
    return vote(best, equal, rule)


# ---- ballots of trees


def chosen_ballot(tree: Tree) -> Ballot | None:
    """The answer a search settled on; None when it found none."""
    return _ballot(tree, tree.chosen) if tree.chosen else None


def leaf_ballots(tree: Tree) -> list[Ballot]:
    """All answers of one tree, in the order they were found: n trajectories at the price of one search."""
    return [_ballot(tree, node.tag) for node in tree.nodes if node.kind == "answer"]


def best_by_rollout(tree: Tree) -> dict[int, Ballot]:
    """rollout -> its answer of highest score, for accuracy over rollouts; rollouts without one are left out."""
    found: dict[int, Ballot] = {}
    for node in tree.nodes:
        if node.kind != "answer":
            continue
        ballot = _ballot(tree, node.tag)
        held = found.get(node.rollout)
        if held is None or ballot.score > held.score:
            found[node.rollout] = ballot
    return found


def _ballot(tree: Tree, tag: str) -> Ballot:
    nodes = path_to(tree, tag)
    leaf = nodes[-1]
    return Ballot(
        answer=leaf.answer or "",
        score=leaf.q_value,
        log_prob=sum(node.log_prob for node in nodes),
        tokens=sum(node.written for node in nodes),
        tag=tag,
    )


# ---- the running search


def choose(live: LiveTree, settings: SearchSettings, equal: Equal) -> str:
    """Tag of the answer node the tree settles on; "" for none."""
    answers = [node for node in live.nodes if node.kind == "answer"]
    if not answers:
        return ""
    if settings.compat:
        return _rstar_order(live.root)[0].tag
    if settings.choose == "value":
        return max(answers, key=q_value).tag
    winner = vote(_live_ballots(answers), equal)[0]
    return max(winner.ballots, key=lambda ballot: ballot.score).tag


def stop_reason(live: LiveTree, settings: SearchSettings, equal: Equal) -> str:
    """Why no further rollout is needed, or "" (SearchSettings.stop).

    decided: by votes, the leader is ahead by more than all answers that the remaining rollouts could give; by value,
    an answer has the highest value there is. confident: see `lead_probability`.
    """
    answers = [node for node in live.nodes if node.kind == "answer"]
    if settings.stop == "rollouts" or not answers:
        return ""
    if settings.choose == "value":
        return "decided" if max(map(q_value, answers)) >= 1.0 else ""
    counts = [tally.count for tally in vote(_live_ballots(answers), equal)] + [0]
    remaining = settings.rollouts - live.rollouts
    if counts[0] - counts[1] > remaining * settings.answers_kept:
        return "decided"
    sure = lead_probability(counts[0], counts[1]) >= settings.confidence
    return "confident" if settings.stop == "confident" and sure else ""


def lead_probability(first: int, second: int) -> float:
    """P(p > 1/2) under Beta(first + 1, second + 1): that the leader of two answers leads in truth.

    For whole counts the regularised incomplete beta function at 1/2 is a binomial tail (Adaptive-Consistency, Aggarwal
    et al. 2023, stops by it).
    """
    draws = first + second + 1
    return sum(math.comb(draws, hits) for hits in range(first + 1)) / 2**draws


def _live_ballots(answers: Iterable[LiveNode]) -> list[Ballot]:
    return [Ballot(node.answer or "", score=q_value(node), tag=node.tag) for node in answers]


def _rstar_order(root: LiveNode) -> list[LiveNode]:
    """Answer nodes by Q in the public code's order of equals: level by level, each sorted by Q."""
    found, level = [], [root]
    while level:
        below = [child for node in level for child in node.children]
        below.sort(key=q_value, reverse=True)
        found += [node for node in below if node.kind == "answer"]
        level = [node for node in below if node.children]
    return sorted(found, key=q_value, reverse=True)
