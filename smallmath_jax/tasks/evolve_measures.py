"""What a round of self-evolution is measured by: pass@1, votes, best-of-N, search, and accuracy against cost.

All numbers are of held-out problems. Trajectories without search come from `chains`, with search from trees that never
saw a gold answer; their answers are graded here, afterwards.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from smallmath_jax.records import Tree
from smallmath_jax.report.metrics import accuracy, by, wilson
from smallmath_jax.search.vote import Ballot, leaf_ballots, vote
from smallmath_jax.tasks.chains import GREEDY, SAMPLED
from smallmath_jax.tasks.driver import same_answer

Row = dict[str, Any]
WEIGHTED = "PPM-weighted vote"
MAJORITY, BEST, LIKELY = "majority", "best of N by PPM", "best of N by log-probability"
BOTH = "best of N by PPM and log-probability"
POSTERIOR = "vote by PPM odds and probability"  # of answers that were enumerated, not sampled
COVERAGE = "coverage"
SEARCH_CHOICE, SEARCH_VOTE = "search, its choice", "search, vote by PPM odds and probability"


def share(right: int, count: int) -> dict[str, Any]:
    """{"accuracy", "n", "ci"} of a count."""
    return {"accuracy": right / max(count, 1), "n": count, "ci": list(wilson(right, count))}


def best_ballot(ballots: Sequence[Ballot], rule: str) -> str | None:
    """The answer that wins by a rule of this page; None without ballots.

    WEIGHTED sums exp(raw) over samples, which come as often as the policy is likely to write them. POSTERIOR sums
    exp(raw + log p): the leaves of a search are distinct, so their probability must be put in.
    """
    if not ballots:
        return None
    if rule in WEIGHTS:
        highest = max(map(WEIGHTS[rule], ballots))
        return _heaviest(ballots, [math.exp(WEIGHTS[rule](one) - highest) for one in ballots])
    if rule in BESTS:
        return max(ballots, key=BESTS[rule]).answer
    return vote(ballots, same_answer, "best" if rule == BEST else "majority")[0].answer


def raw_score(ballot: Ballot) -> float:
    """5 atanh(score): the raw score of a PPM, whose score is tanh(raw / 5), and a log odds (Bradley-Terry).

    The linear weight of the public code's vote hardly tells apart what tanh(raw / 5) has brought near 0.
    """
    return 5.0 * math.atanh(max(-0.999, min(0.999, ballot.score)))


WEIGHTS: dict[str, Callable[[Ballot], float]] = {
    WEIGHTED: raw_score,
    POSTERIOR: lambda ballot: raw_score(ballot) + ballot.log_prob,
}
BESTS: dict[str, Callable[[Ballot], float]] = {
    LIKELY: lambda ballot: ballot.log_prob,
    BOTH: lambda ballot: raw_score(ballot) + ballot.log_prob,
}


def _heaviest(ballots: Sequence[Ballot], weights: Sequence[float]) -> str:
    totals: list[list[Any]] = []
    for ballot, weight in zip(ballots, weights, strict=True):
        home = next((one for one in totals if same_answer(one[0], ballot.answer)), None)
        if home is None:
            totals.append([ballot.answer, weight])
        else:
            home[1] += weight
    return max(totals, key=lambda total: total[1])[0]


def chain_measures(rows: Sequence[Row], samples: int) -> dict[str, Any]:
    """Numbers of trajectories without search: greedy and sampled pass@1, and what N samples amount to together."""
    greedy = [row for row in rows if row["extra"]["decoding"] == GREEDY]
    sampled = [row for row in rows if row["extra"]["decoding"] == SAMPLED]
    groups = _groups(sampled)
    scored = any(row["extra"]["score"] is not None for row in sampled)
    rules = [MAJORITY, LIKELY, *((BEST, BOTH, WEIGHTED) if scored else ())]
    record: dict[str, Any] = {
        "greedy": accuracy(greedy),
        "sampled": accuracy(sampled),
        "by_level": by(sampled, lambda row: row["level"]),
        "by_subject": by(sampled, lambda row: row["subject"]),
        "at_n": {rule: pick_share(groups.values(), samples, rule) for rule in rules},
        COVERAGE: coverage(groups.values(), samples),
        "executed": _executed(sampled),
    }
    if scored:
        record["auc"] = within_auc(groups.values())
        by_likelihood = lambda row: row["extra"]["log_prob"]
        record["auc_log_prob"] = within_auc(groups.values(), by_likelihood)
    return record


def _groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["sample"]):
        groups[row["problem_id"]].append(row)
    return dict(groups)


def _executed(rows: Sequence[Row]) -> float:
    return sum(row["extra"]["status"] == "ok" for row in rows) / max(len(rows), 1)


def ballots_of(rows: Iterable[Row]) -> list[Ballot]:
    """A ballot of each answered trajectory."""
    return [
        Ballot(
            row["answer"],
            score=row["extra"]["score"] or 0.0,
            log_prob=row["extra"]["log_prob"],
            tokens=max(row["extra"]["written"], 1),
        )
        for row in rows
        if row["answer"] is not None
    ]


def pick_share(groups: Iterable[Sequence[Row]], count: int, rule: str) -> dict[str, Any]:
    """Share of problems whose winner among the first `count` samples is right."""
    right = total = 0
    for rows in groups:
        rows = rows[:count]
        winner = best_ballot(ballots_of(rows), rule)
        verdicts = {row["answer"]: row["verdict"] for row in rows if row["answer"] is not None}
        right += verdicts.get(winner) == "correct"
        total += 1
    return share(right, total)


def coverage(groups: Iterable[Sequence[Row]], count: int) -> dict[str, Any]:
    """Share of problems with a right one among the first `count` samples."""
    found = [any(row["verdict"] == "correct" for row in rows[:count]) for rows in groups]
    return share(sum(found), len(found))


def within_auc(
    groups: Iterable[Sequence[Row]],
    score: Callable[[Row], float | None] = lambda row: row["extra"]["score"],
) -> dict[str, Any]:
    """Chance that of two answered samples of one problem, one right and one wrong, the right one scores higher."""
    wins, problems = 0.0, 0
    for rows in groups:
        rows = [row for row in rows if row["answer"] is not None]
        right = [score(row) for row in rows if row["verdict"] == "correct"]
        wrong = [score(row) for row in rows if row["verdict"] == "wrong"]
        if right and wrong:
            better = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
            wins += better / (len(right) * len(wrong))
            problems += 1
    return {"auc": wins / problems if problems else None, "problems": problems}


def scaling(rows: Sequence[Row], trees: Sequence[Tree], largest: int) -> dict[str, list[Row]]:
    """Accuracy against trajectories and tokens a problem: votes and best-of-N of 1, 2, 4 ... samples, and search."""
    groups = list(_groups(row for row in rows if row["extra"]["decoding"] == SAMPLED).values())
    scored = any(row["extra"]["score"] is not None for found in groups for row in found)
    rules = [MAJORITY, LIKELY, *((BEST, BOTH, WEIGHTED) if scored else ()), COVERAGE]
    curves: dict[str, list[Row]] = {rule: [] for rule in rules}
    size = 1
    while size <= largest and groups:
        written = sum(row["extra"]["written"] for found in groups for row in found[:size])
        cost = {"trajectories": size, "tokens": written / len(groups)}
        for rule in rules:
            found = coverage(groups, size) if rule == COVERAGE else pick_share(groups, size, rule)
            curves[rule].append(cost | found)
        size *= 2
    return curves | search_scaling(trees)


def search_scaling(trees: Sequence[Tree]) -> dict[str, list[Row]]:
    """The same of searches, cut off after 1, 2, 4 ... rollouts: the answer of highest score, and a vote.

    Tokens are those of a tree's whole search in proportion to the nodes it had by then: what a filtered candidate
    cost is not stored by rollout.
    """
    curves: dict[str, list[Row]] = {SEARCH_CHOICE: [], SEARCH_VOTE: []}
    largest = max((tree.rollouts for tree in trees), default=0)
    found = [leaves(tree) for tree in trees]
    size = 1
    while trees and size < 2 * largest:
        cut = [[leaf for leaf in one if leaf.rollout < size] for one in found]
        shares = [_spent(tree, size) for tree in trees]
        cost = {"trajectories": sum(map(len, cut)) / len(cut), "tokens": sum(shares) / len(cut)}
        for name, rule in ((SEARCH_CHOICE, BEST), (SEARCH_VOTE, POSTERIOR)):
            curves[name].append(cost | share(sum(leaf_right(one, rule) for one in cut), len(cut)))
        size *= 2
    return {name: points for name, points in curves.items() if points}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An answer of a tree."""

    ballot: Ballot
    rollout: int
    right: bool


def leaves(tree: Tree) -> list[Leaf]:
    """All answers of a tree, in the order they were found."""
    nodes = {node.tag: node for node in tree.nodes}
    scores = {tag: node.score or 0.0 for tag, node in nodes.items()}
    return [
        Leaf(
            dataclasses.replace(ballot, score=scores[ballot.tag]),
            nodes[ballot.tag].rollout,
            nodes[ballot.tag].verdict == "correct",
        )
        for ballot in leaf_ballots(tree)
    ]


def _spent(tree: Tree, rollouts: int) -> float:
    made = sum(node.rollout < rollouts for node in tree.nodes)
    return tree.tokens * made / len(tree.nodes)


def leaf_right(found: Sequence[Leaf], rule: str) -> bool:
    """Whether the answer that wins among these is right."""
    winner = best_ballot([leaf.ballot for leaf in found], rule)
    return any(leaf.ballot.answer == winner and leaf.right for leaf in found)


def search_measures(trees: Sequence[Tree]) -> dict[str, Any]:
    """Numbers of graded evaluation trees: a vote of each search's answers, its own choice, coverage, tokens.

    `search_accuracy` is of the vote by PPM odds and probability, `search_choice` of the answer of highest Q-value, as
    the public code chooses.
    """
    chosen = sum(_verdict_of(tree, tree.chosen) == "correct" for tree in trees)
    found = [leaves(tree) for tree in trees]
    count = max(len(trees), 1)
    return {
        "search_accuracy": share(sum(leaf_right(one, POSTERIOR) for one in found), len(trees)),
        "search_choice": share(chosen, len(trees)),
        "search_majority": share(sum(leaf_right(one, MAJORITY) for one in found), len(trees)),
        "search_coverage": share(sum(any(leaf.right for leaf in one) for one in found), len(trees)),
        "search_tokens": sum(tree.tokens for tree in trees) / count,
        "search_answers": sum(map(len, found)) / count,
    }


def _verdict_of(tree: Tree, tag: str) -> str:
    return next((node.verdict for node in tree.nodes if node.tag == tag), "")


def graded(tree: Tree, verdicts: Mapping[str, str]) -> Tree:
    """The tree with the verdict of each answer (none: ""), for what was searched without gold."""
    given = lambda node: dataclasses.replace(node, verdict=verdicts.get(node.answer, ""))
    nodes = [given(node) if node.kind == "answer" else node for node in tree.nodes]
    return dataclasses.replace(tree, nodes=nodes)
