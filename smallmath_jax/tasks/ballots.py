"""Many answers to one problem, however they were found: which is chosen, by group, by cost, and when one could stop.

A case is a problem with its answers in the order of the units that gave them: samples, complete searches, or rollouts
of one search. A measure is a function (case) -> verdict of what it chooses; what could not be graded is neither right
nor wrong: it is left out and counted (law 7).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from smallmath_jax.report.metrics import UNGRADABLE, wilson
from smallmath_jax.search.vote import (
    Ballot,
    Scale,
    early_stop,
    group_answers,
    published_vote,
    vote,
)
from smallmath_jax.tasks.driver import same_answer

MAJORITY, COVERAGE = "majority", "coverage"
LIKELY = "best of N by log-probability"
BEST, BOTH = "best of N by PPM", "best of N by PPM and log-probability"
WEIGHTED, POSTERIOR = "PPM-weighted vote", "vote by PPM odds and probability"
PUBLISHED = "majority of the top {k} by PPM"  # rStar-Math's protocol over complete searches
RULES = {
    MAJORITY: "majority",
    LIKELY: "likeliest",
    BEST: "best",
    BOTH: "best_posterior",
    WEIGHTED: "weighted",
    POSTERIOR: "posterior",
}
# Early stops that are tried on what was run to its end: (name, SearchSettings.stop, confidence).
STOPS = (
    ("decided", "decided", 0.95),
    *((f"confident at {level}", "confident", level) for level in (0.99, 0.95, 0.9, 0.8)),
)
equal = functools.lru_cache(maxsize=1 << 16)(same_answer)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer with its grade, and the unit that gave it, from 0."""

    ballot: Ballot
    verdict: str
    unit: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem and its answers. `spent[n]`: tokens of the first n + 1 units together."""

    problem_id: str
    answers: tuple[Answer, ...]
    spent: tuple[float, ...]
    units: int  # that were asked for; a search may have ended before them
    most: int = 1  # answers a unit can give
    set: str = ""
    level: int | None = None
    subject: str | None = None


Measure = Callable[[Case], str]


def first(case: Case, units: int) -> Case:
    """The case as it was after so many units."""
    kept = tuple(answer for answer in case.answers if answer.unit < units)
    return dataclasses.replace(case, answers=kept, spent=case.spent[:units], units=units)


def tokens(case: Case) -> float:
    return case.spent[-1] if case.spent else 0.0


# ---- measures


def chosen(
    case: Case, choose: Callable[[Sequence[Ballot]], Sequence[Any]] | None = None, **options: Any
) -> str:
    """The verdict on the answer that `choose` puts first (default: `vote`); "no_answer" where there is none."""
    ballots = [answer.ballot for answer in case.answers]
    if not ballots:
        return "no_answer"
    winner = (choose or vote)(ballots, equal, **options)[0].answer
    return next(one.verdict for one in case.answers if one.ballot.answer == winner)


def any_right(case: Case) -> str:
    """ "correct" where one answer is; without one, an ungradable answer leaves it open."""
    verdicts = [answer.verdict for answer in case.answers]
    known = ("correct", *UNGRADABLE)
    return next((one for one in known if one in verdicts), "wrong" if verdicts else "no_answer")


def measures(names: Iterable[str], scale: Scale | None, top_k: int = 0) -> dict[str, Measure]:
    """The measures of these names; those that need scores only where there is a reward model's scale.

    With `top_k`, the published protocol too.
    """
    found: dict[str, Measure] = {}
    for name in names:
        if name == COVERAGE:
            found[name] = any_right
        elif scale is not None:
            found[name] = functools.partial(chosen, rule=RULES[name], scale=scale)
        elif name in (MAJORITY, LIKELY):
            found[name] = functools.partial(chosen, rule=RULES[name])
    if top_k and scale is not None:
        by_score = functools.partial(chosen, choose=published_vote, top_k=top_k)
        found[PUBLISHED.format(k=top_k)] = by_score
    return found


# ---- shares


def share(right: int, count: int) -> dict[str, Any]:
    """{"accuracy", "n", "correct", "ci"} of a count."""
    interval = list(wilson(right, count))
    return {"accuracy": right / max(count, 1), "n": count, "correct": right, "ci": interval}


def share_of(verdicts: Iterable[str]) -> dict[str, Any]:
    """`share` of problems by the verdict on each; those that could not be graded are left out, as `ungradable`."""
    verdicts = list(verdicts)
    known = [verdict for verdict in verdicts if verdict not in UNGRADABLE]
    result = share(sum(verdict == "correct" for verdict in known), len(known))
    if len(known) < len(verdicts):
        result["ungradable"] = len(verdicts) - len(known)
    return result


def shares(cases: Sequence[Case], found: Mapping[str, Measure]) -> dict[str, dict[str, Any]]:
    """Measure's name -> share of the cases it gets right."""
    return {name: share_of(map(measure, cases)) for name, measure in found.items()}


GROUPS: dict[str, Callable[[Case], Any]] = {
    "by_set": lambda case: case.set,
    "by_level": lambda case: case.level,
    "by_subject": lambda case: case.subject,
}


def grouped_shares(
    cases: Sequence[Case], found: Mapping[str, Measure]
) -> dict[str, dict[str, Any]]:
    """`shares`, each with the same by_set, by_level and by_subject."""
    result = {}
    for name, measure in found.items():
        verdicts = [measure(case) for case in cases]
        result[name] = share_of(verdicts)
        for field, read in GROUPS.items():
            groups: dict[str, list[str]] = {}
            for case, verdict in zip(cases, verdicts, strict=True):
                value = read(case)
                groups.setdefault("unknown" if value is None else str(value), []).append(verdict)
            result[name][field] = {label: share_of(groups[label]) for label in sorted(groups)}
    return result


def mean(values: Iterable[float]) -> float:
    """Their mean; 0 without any."""
    values = list(values)
    return sum(values) / max(len(values), 1)


# ---- cost


def scaling(
    cases: Sequence[Case],
    found: Mapping[str, Measure],
    title: str = "{name}",
    count: Callable[[Case], float] = lambda case: case.units,
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy after 1, 2, 4, ... and all units; a point is {"trajectories", "tokens", "accuracy", "n", "ci"}.

    `title` names a curve; `count` tells a cut case's trajectories.
    """
    curves: dict[str, list[dict[str, Any]]] = {title.format(name=name): [] for name in found}
    largest = max((case.units for case in cases), default=0)
    sizes = [1 << power for power in range(largest.bit_length()) if 1 << power < largest]
    for size in [*sizes, largest] if largest else []:
        cut = [first(case, size) for case in cases]
        cost = {"trajectories": mean(map(count, cut)), "tokens": mean(map(tokens, cut))}
        for name, result in shares(cut, found).items():
            curves[title.format(name=name)].append(cost | result)
    return {name: points for name, points in curves.items() if points}


def stopping(
    cases: Sequence[Case], found: Mapping[str, Measure], units: str
) -> list[dict[str, Any]]:
    """What early stops would have saved, and what accuracy they would have left: a row a rule and measure.

    A row: {"units", "stop", "choice", "tokens", "tokens_saved", "units_taken", "full_accuracy", "accuracy", "n", "ci"},
    tokens and units a problem, tokens_saved as a share. A case is cut where `early_stop` would have ended it; draws
    are keyed by what they are, so a search that stops there is the same up to there.
    """
    if not cases or max(case.units for case in cases) < 2:
        return []
    leads = [_leads(case) for case in cases]
    whole, rows = shares(cases, found), []
    spent = mean(map(tokens, cases))
    for name, stop, confidence in STOPS:
        ends = [_end(case, lead, stop, confidence) for case, lead in zip(cases, leads, strict=True)]
        cut = [first(case, end) for case, end in zip(cases, ends, strict=True)]
        used = mean(map(tokens, cut))
        cost = {"units": units, "stop": name, "tokens": used, "units_taken": mean(ends)}
        cost["tokens_saved"] = 1 - used / spent if spent else 0.0
        for choice, result in shares(cut, found).items():
            full = {"choice": choice, "full_accuracy": whole[choice]["accuracy"]}
            rows.append(cost | full | result)
    return rows


def _leads(case: Case) -> list[tuple[int, int]]:
    """(votes of the leader, of the next) after 0, 1, 2, ... units, as far as the case went."""
    leads = []
    for count in range(len(case.spent) + 1):
        ballots = [answer.ballot for answer in case.answers if answer.unit < count]
        sizes = sorted(map(len, group_answers(ballots, equal)), reverse=True)
        leads.append(tuple([*sizes, 0, 0][:2]))
    return leads


def _end(case: Case, leads: Sequence[tuple[int, int]], stop: str, confidence: float) -> int:
    """After how many units the case would have ended."""
    for count, (leader, second) in enumerate(leads):
        left = (case.units - count) * case.most
        if leader and early_stop(leader, second, left, stop, confidence):
            return count
    return len(leads) - 1
