"""What an evaluation by steps is measured by: pass@1, votes, best-of-N, search, and accuracy against cost.

All numbers are of held-out problems. Trajectories without search are rows of `chains`; trees were searched without a
gold answer, and what counts of them, once graded, is a `Searched`.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from smallmath_jax.records import Node, Problem, Tree
from smallmath_jax.report.metrics import accuracy, by
from smallmath_jax.search.vote import Ballot, Scale, chosen_ballot, leaf_ballots
from smallmath_jax.tasks.ballots import (
    BEST,
    BOTH,
    COVERAGE,
    LIKELY,
    MAJORITY,
    POSTERIOR,
    WEIGHTED,
    Answer,
    Case,
    first,
    mean,
    measures,
    scaling,
    share_of,
    shares,
    stopping,
)
from smallmath_jax.tasks.chains import GREEDY, SAMPLED

Row = dict[str, Any]
AT_N = (MAJORITY, LIKELY, BEST, BOTH, WEIGHTED)  # of N samples, or of the answers of N searches
SEARCH_CHOICE, SEARCH_VOTE = "search, its choice", "search, vote by PPM odds and probability"
SEARCHES = "complete searches, {name}"


# ---- trajectories without search


def sample_cases(rows: Iterable[Row]) -> list[Case]:
    """A case of each problem's sampled trajectories; of a problem that a source has twice the first ones count."""
    groups: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row["sample"]):
        if row["extra"]["decoding"] == SAMPLED:
            groups[row["problem_id"]].setdefault(row["sample"], row)
    return [_sample_case(name, list(found.values())) for name, found in groups.items()]


def _sample_case(name: str, rows: Sequence[Row]) -> Case:
    answers = [
        Answer(_ballot(row), row["verdict"], unit)
        for unit, row in enumerate(rows)
        if row["answer"] is not None
    ]
    spent = cumulative(row["extra"]["written"] for row in rows)
    where = {"set": rows[0]["extra"]["set"]}
    where |= {"level": rows[0]["level"], "subject": rows[0]["subject"]}
    return Case(name, tuple(answers), spent, len(rows), **where)


def _ballot(row: Row) -> Ballot:
    extra = row["extra"]
    tokens = max(extra["written"], 1)
    return Ballot(row["answer"], extra["score"] or 0.0, extra["log_prob"], tokens)


def cumulative(values: Iterable[float]) -> tuple[float, ...]:
    total, sums = 0.0, []
    for value in values:
        total += value
        sums.append(total)
    return tuple(sums)


def chain_measures(rows: Sequence[Row], samples: int, scale: Scale | None) -> dict[str, Any]:
    """Numbers of trajectories without search: greedy and sampled pass@1, and what N samples amount to together.

    `scale`: of the reward model that scored them; None without one. by_set has the same of each problem set.
    """
    record = _chain_numbers(rows, samples, scale)
    sampled = [row for row in rows if row["extra"]["decoding"] == SAMPLED]
    record["by_level"] = by(sampled, lambda row: row["level"])
    record["by_subject"] = by(sampled, lambda row: row["subject"])
    record["by_set"] = {
        name: _chain_numbers(found, samples, scale)
        for name, found in grouped(rows, lambda row: row["extra"]["set"]).items()
    }
    if scale is not None:
        cases = [first(case, samples) for case in sample_cases(rows)]
        record["auc"] = within_auc(cases)
        record["auc_log_prob"] = within_auc(cases, lambda answer: answer.ballot.log_prob)
    return record


def _chain_numbers(rows: Sequence[Row], samples: int, scale: Scale | None) -> dict[str, Any]:
    """`tokens`: written by the policy, a sampled trajectory."""
    greedy = [row for row in rows if row["extra"]["decoding"] == GREEDY]
    sampled = [row for row in rows if row["extra"]["decoding"] == SAMPLED]
    cases = [first(case, samples) for case in sample_cases(sampled)]
    return {
        "greedy": accuracy(greedy),
        "sampled": accuracy(sampled),
        "at_n": shares(cases, measures(AT_N, scale)),
        COVERAGE: shares(cases, measures((COVERAGE,), scale))[COVERAGE],
        "executed": mean(row["extra"]["status"] == "ok" for row in sampled),
        "tokens": mean(row["extra"]["written"] for row in sampled),
    }


def grouped(items: Iterable[Any], field: Callable[[Any], str]) -> dict[str, list[Any]]:
    """field(item) -> items, in the order of the fields."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        groups[field(item)].append(item)
    return dict(sorted(groups.items()))


def within_auc(
    cases: Iterable[Case],
    score: Callable[[Answer], float] = lambda answer: answer.ballot.score,
) -> dict[str, Any]:
    """Chance that of two answered samples of one problem, one right and one wrong, the right one scores higher."""
    wins, problems = 0.0, 0
    for case in cases:
        right = [score(one) for one in case.answers if one.verdict == "correct"]
        wrong = [score(one) for one in case.answers if one.verdict == "wrong"]
        if right and wrong:
            better = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
            wins += better / (len(right) * len(wrong))
            problems += 1
    return {"auc": wins / problems if problems else None, "problems": problems}


# ---- searches


@dataclasses.dataclass(frozen=True)
class Searched:
    """What counts of a tree whose answers are graded: all its answers, by rollout, and the one it settled on."""

    leaves: Case
    chosen: Answer | None
    seed: int
    tokens: int  # of the whole search
    failed: bool


def searched(tree: Tree, problem: Problem) -> Searched:
    """Of a graded tree. Tokens by rollout are the whole search's in proportion to the nodes there were by then.

    What a filtered candidate cost is not stored by rollout.
    """
    nodes = {node.tag: node for node in tree.nodes}
    settings = tree.extra.get("settings", {})
    made = [sum(node.rollout <= number for node in tree.nodes) for number in range(tree.rollouts)]
    best = chosen_ballot(tree)
    where = {"set": problem.meta.get("set", problem.source)}
    where |= {"level": tree.level, "subject": tree.subject}
    leaves = Case(
        tree.problem_id,
        tuple(_leaf(ballot, nodes[ballot.tag]) for ballot in leaf_ballots(tree)),
        tuple(tree.tokens * count / len(tree.nodes) for count in made),
        settings.get("rollouts", tree.rollouts),
        settings.get("answers_kept", 1),
        **where,
    )
    answer = None if best is None else _leaf(best, nodes[best.tag])
    return Searched(leaves, answer, tree.seed, tree.tokens, tree.stopped == "failed")


def _leaf(ballot: Ballot, node: Node) -> Answer:
    """Its score is the preference model's, not the Q-value that a further visit may have moved."""
    return Answer(dataclasses.replace(ballot, score=node.score or 0.0), node.verdict, node.rollout)


def searches_case(group: Sequence[Searched]) -> Case:
    """One problem's searches, each with the answer it settled on."""
    answers = (
        dataclasses.replace(one.chosen, unit=unit)
        for unit, one in enumerate(group)
        if one.chosen is not None
    )
    spent = cumulative(one.tokens for one in group)
    return dataclasses.replace(
        group[0].leaves, answers=tuple(answers), spent=spent, units=len(group), most=1
    )


def chains_case(tree: Tree, problem: Problem) -> Case:
    """A graded tree of independent chains (`beam.sample_chains`): each chain a unit."""
    leaves = searched(tree, problem).leaves
    chain = lambda tag: int(tag.split(".")[1]) - 1
    answers = (dataclasses.replace(one, unit=chain(one.ballot.tag)) for one in leaves.answers)
    written = [0] * tree.rollouts
    for node in tree.nodes[1:]:
        written[chain(node.tag)] += node.written
    return dataclasses.replace(
        leaves, answers=tuple(answers), spent=cumulative(written), units=tree.rollouts, most=1
    )


def search_measures(groups: Sequence[Sequence[Searched]], scale: Scale | None) -> dict[str, Any]:
    """Numbers of the first search of each problem: a vote of its answers, its own choice, coverage, tokens.

    `groups`: of each problem its searches, by seed. `search_accuracy` is of the vote by PPM odds and probability,
    `search_choice` of the answer the search settled on (highest Q-value, as the public code chooses).
    """
    record = _search_numbers(groups, scale)
    record["by_set"] = {
        name: _search_numbers(found, scale)
        for name, found in grouped(groups, lambda group: group[0].leaves.set).items()
    }
    return record


def _search_numbers(groups: Sequence[Sequence[Searched]], scale: Scale | None) -> dict[str, Any]:
    one = [group[0] for group in groups]
    votes = shares(
        [search.leaves for search in one], measures((POSTERIOR, MAJORITY, COVERAGE), scale)
    )
    record = {
        "search_accuracy": votes.get(POSTERIOR, votes[MAJORITY]),
        "search_choice": share_of(verdict_of(search.chosen) for search in one),
        "search_majority": votes[MAJORITY],
        "search_coverage": votes[COVERAGE],
        "search_tokens": mean(search.tokens for search in one),
        "search_answers": mean(len(search.leaves.answers) for search in one),
    }
    failed = sum(search.failed for group in groups for search in group)
    return record | ({"search_failed": failed} if failed else {})


def verdict_of(answer: Answer | None) -> str:
    return "no_answer" if answer is None else answer.verdict


# ---- accuracy against cost


def all_scaling(
    rows: Sequence[Row],
    groups: Sequence[Sequence[Searched]],
    scale: Scale | None,
    top_k: int,
) -> dict[str, list[Row]]:
    """Accuracy against trajectories and tokens a problem: of samples, leaves of one search, complete searches."""
    names = (*AT_N, COVERAGE)
    curves = scaling(sample_cases(rows), measures(names, scale))
    found = measures((BEST, POSTERIOR), scale) or measures((MAJORITY,), scale)
    titles = {BEST: SEARCH_CHOICE, POSTERIOR: SEARCH_VOTE, MAJORITY: "search, majority"}
    leaves = [group[0].leaves for group in groups]
    count = lambda case: len(case.answers)
    curves |= scaling(leaves, {titles[name]: one for name, one in found.items()}, count=count)
    if any(len(group) > 1 for group in groups):
        whole = [searches_case(group) for group in groups]
        curves |= scaling(whole, measures(names, scale, top_k), SEARCHES)
    return curves


def all_stopping(
    rows: Sequence[Row],
    groups: Sequence[Sequence[Searched]],
    scale: Scale | None,
    top_k: int,
) -> list[Row]:
    """What early stops would save: of samples, of the rollouts of one search, of complete searches."""
    told = stopping(sample_cases(rows), measures((MAJORITY, WEIGHTED), scale), "samples")
    leaves = [group[0].leaves for group in groups]
    told += stopping(leaves, measures((MAJORITY, POSTERIOR), scale), "rollouts of one search")
    whole = [searches_case(group) for group in groups]
    return told + stopping(whole, measures((MAJORITY,), scale, top_k), "complete searches")


def graded(tree: Tree, verdicts: Mapping[str, str]) -> Tree:
    """The tree with the verdict of each answer (none: ""), for what was searched without gold."""
    given = lambda node: dataclasses.replace(node, verdict=verdicts.get(node.answer, ""))
    nodes = [given(node) if node.kind == "answer" else node for node in tree.nodes]
    return dataclasses.replace(tree, nodes=nodes)
