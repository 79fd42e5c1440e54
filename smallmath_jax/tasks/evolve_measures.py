"""What a round of self-evolution is measured by: pass@1, votes, best-of-N, search, and accuracy against cost.

All numbers are of held-out problems. Trajectories without search come from `chains`, with search from trees that never
saw a gold answer; their answers are graded here, afterwards.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from smallmath_jax.records import Node, Tree
from smallmath_jax.report.metrics import accuracy, by, wilson
from smallmath_jax.search.vote import Ballot, leaf_ballots, vote
from smallmath_jax.tasks.chains import GREEDY, SAMPLED
from smallmath_jax.tasks.driver import same_answer

Row = dict[str, Any]
WEIGHTED = "PPM-weighted vote"
MAJORITY, BEST, LIKELY = "majority", "best of N by PPM", "best of N by log-probability"
COVERAGE = "coverage"
SEARCH_CHOICE, SEARCH_VOTE = "search, its choice", "search, PPM-weighted vote of its answers"


def share(right: int, count: int) -> dict[str, Any]:
    """{"accuracy", "n", "ci"} of a count."""
    return {"accuracy": right / max(count, 1), "n": count, "ci": list(wilson(right, count))}


def best_ballot(ballots: Sequence[Ballot], rule: str) -> str | None:
    """The answer that wins by a rule of this page; None without ballots."""
    if not ballots:
        return None
    if rule == LIKELY:
        return max(ballots, key=lambda ballot: ballot.log_prob).answer
    if rule == WEIGHTED:
        return _weighted(ballots)
    return vote(ballots, same_answer, "best" if rule == BEST else "majority")[0].answer


def _weighted(ballots: Sequence[Ballot]) -> str:
    """The vote weighted by ((1 + s) / (1 - s)) ** 2.5, which is exp(raw) of a score s = tanh(raw / 5).

    A Bradley-Terry model's raw score is a log odds. The linear weight of the public code hardly tells apart what
    tanh(raw / 5) has brought near 0.
    """
    totals: list[list[Any]] = []
    for ballot in ballots:
        score = max(-0.999, min(0.999, ballot.score))
        weight = ((1 + score) / (1 - score)) ** 2.5
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
    rules = [MAJORITY, LIKELY, *((BEST, WEIGHTED) if scored else ())]
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
    rules = [MAJORITY, LIKELY, *((BEST, WEIGHTED) if scored else ()), COVERAGE]
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
    """The same of searches, cut off after 1, 2, 4 ... rollouts: the answer of highest score, and a weighted vote.

    Tokens are those of a tree's whole search in proportion to the nodes it had by then: what a filtered candidate
    cost is not stored by rollout.
    """
    curves: dict[str, list[Row]] = {SEARCH_CHOICE: [], SEARCH_VOTE: []}
    largest = max((tree.rollouts for tree in trees), default=0)
    size = 1
    while trees and size < 2 * largest:
        cut = [_cut(tree, min(size, largest)) for tree in trees]
        answers = sum(len(nodes) for nodes, _ in cut) / len(cut)
        cost = {"trajectories": answers, "tokens": sum(tokens for _, tokens in cut) / len(cut)}
        for name, rule in ((SEARCH_CHOICE, BEST), (SEARCH_VOTE, WEIGHTED)):
            right = sum(_tree_right(nodes, rule) for nodes, _ in cut)
            curves[name].append(cost | share(right, len(cut)))
        size *= 2
    return {name: points for name, points in curves.items() if points}


def _cut(tree: Tree, rollouts: int) -> tuple[list[Node], float]:
    """(answers found in the first rollouts, tokens spent until then)."""
    made = [node for node in tree.nodes if node.rollout < rollouts]
    answers = [node for node in made if node.kind == "answer"]
    return answers, tree.tokens * len(made) / len(tree.nodes)


def _tree_right(answers: Sequence[Node], rule: str) -> bool:
    ballots = [Ballot(node.answer, score=node.score or 0.0) for node in answers]
    winner = best_ballot(ballots, rule)
    return any(node.answer == winner and node.verdict == "correct" for node in answers)


def search_measures(trees: Sequence[Tree]) -> dict[str, Any]:
    """Numbers of graded evaluation trees: the search's own choice, a vote of its answers, coverage, tokens."""
    chosen = sum(_verdict_of(tree, tree.chosen) == "correct" for tree in trees)
    answers = [[node for node in tree.nodes if node.kind == "answer"] for tree in trees]
    voted = sum(_tree_right(found, WEIGHTED) for found in answers)
    covered = sum(any(node.verdict == "correct" for node in found) for found in answers)
    count = max(len(trees), 1)
    return {
        "search_accuracy": share(chosen, len(trees)),
        "search_vote": share(voted, len(trees)),
        "search_coverage": share(covered, len(trees)),
        "search_tokens": sum(tree.tokens for tree in trees) / count,
        "search_answers": sum(len(leaf_ballots(tree)) for tree in trees) / count,
    }


def _verdict_of(tree: Tree, tag: str) -> str:
    return next((node.verdict for node in tree.nodes if node.tag == tag), "")


def graded(tree: Tree, verdicts: Mapping[str, str]) -> Tree:
    """The tree with the verdict of each answer, for what was searched without gold."""
    nodes = [
        dataclasses.replace(node, verdict=verdicts[node.answer]) if node.kind == "answer" else node
        for node in tree.nodes
    ]
    return dataclasses.replace(tree, nodes=nodes)
