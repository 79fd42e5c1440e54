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


@dataclasses.dataclass(frozen=True)
class Scale:
    """How a reward model is read: score = tanh(raw / squash); a vote of that score weighs exp(log_weight(score))."""

    squash: float
    log_weight: Callable[[float], float]


def _raw(squash: float) -> Callable[[float], float]:
    """score -> raw = squash * atanh(score), cut off where tanh is flat."""
    return lambda score: squash * math.atanh(max(-0.999, min(0.999, score)))


# By loss. A log odds weighs as odds: the raw value of a PPM (Bradley-Terry; its public code reads it as tanh(raw / 5))
# and of an ORM (a logit, read as 2 sigmoid - 1); a PPM compared after its tanh has the score itself as log odds. A PQM
# gives a mean outcome in [-1, 1] and no log odds: (1 + score) / 2, the chance of a right answer, is its weight.
SCALES = {
    "ppm": Scale(5.0, _raw(5.0)),
    "ppm_tanh": Scale(1.0, lambda score: score),
    "orm": Scale(2.0, _raw(2.0)),
    "pqm": Scale(1.0, lambda score: math.log(max((1.0 + score) / 2.0, 1e-4))),
}


def scale_of(loss: str, tanh_in_loss: bool = False) -> Scale:
    """The scale of a reward model by what it was trained with (fields of config.ppm)."""
    return SCALES["ppm_tanh" if loss == "ppm" and tanh_in_loss else loss]


# (ballot, scale) -> log weight of one vote, or value of which the highest wins.
WEIGHTS: dict[str, Callable[[Ballot, Scale], float]] = {
    "majority": lambda ballot, scale: 0.0,
    "weighted": lambda ballot, scale: scale.log_weight(ballot.score),
    "posterior": lambda ballot, scale: scale.log_weight(ballot.score) + ballot.log_prob,
}
BESTS: dict[str, Callable[[Ballot, Scale], float]] = {
    "best": lambda ballot, scale: ballot.score,
    "likeliest": lambda ballot, scale: ballot.log_prob,
    "best_posterior": lambda ballot, scale: scale.log_weight(ballot.score) + ballot.log_prob,
}
RULES = (*WEIGHTS, *BESTS)


def vote(
    ballots: Sequence[Ballot], equal: Equal, rule: str = "majority", scale: Scale = SCALES["ppm"]
) -> list[Tally]:
    """Groups of equal answers, the winner first.

    majority counts. weighted sums the reward model's odds: for samples, which come as often as the policy is likely to
    write them. posterior sums odds times the policy's probability: for leaves of a search, which are distinct. best,
    likeliest and best_posterior take one ballot: of highest score, probability, or both. A sum's weights are relative
    to the heaviest ballot's. Ties: the higher sum of scores, then the earlier ballot. Raises ValueError for another
    rule.
    """
    if rule not in RULES:
        raise ValueError(f"no vote {rule!r}; known: {', '.join(RULES)}")
    value = WEIGHTS.get(rule) or BESTS[rule]
    highest = max((value(ballot, scale) for ballot in ballots), default=0.0)
    tallies = []
    for group in group_answers(ballots, equal):
        values = [value(ballot, scale) for ballot in group]
        weight = sum(math.exp(one - highest) for one in values) if rule in WEIGHTS else max(values)
        best = max(group, key=lambda ballot: ballot.score)
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


def published_vote(ballots: Sequence[Ballot], equal: Equal, top_k: int = TEST_TOP_K) -> list[Tally]:
    """The published test protocol: of one ballot a search, the top k by PPM score vote."""
    return vote(sorted(ballots, key=lambda ballot: -ballot.score)[:top_k], equal)


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
    first, second = [*(tally.count for tally in vote(_live_ballots(answers), equal)), 0][:2]
    left = (settings.rollouts - live.rollouts) * settings.answers_kept
    return early_stop(first, second, left, settings.stop, settings.confidence)


def early_stop(first: int, second: int, left: int, stop: str, confidence: float = 0.95) -> str:
    """Why a vote may end, or "": `first` votes for the leader, `second` for the next, at most `left` still to come.

    stop: "decided", or "confident", which ends at either.
    """
    if first - second > left:
        return "decided"
    sure = first > 0 and lead_probability(first, second) >= confidence
    return "confident" if stop == "confident" and sure else ""


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
