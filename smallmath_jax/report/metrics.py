"""Numbers of an evaluation: intervals, pass@k, majority votes, accuracy by level and subject."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]  # a line of completions/*.jsonl

UNGRADABLE = ("unparsable_gold", "timeout")  # neither right nor wrong: left out and counted (law 7)


def wilson(correct: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, 1927); 95 % by default. (0, 1) without data."""
    if count == 0:
        return 0.0, 1.0
    share = correct / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def pass_at_k(count: int, correct: int, k: int) -> float:
    """Chance that one of k answers drawn without replacement from `count` is right (Chen et al. 2021, eq. 1)."""
    if k > count:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {count}")
    if count - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(count - correct + 1, count + 1))


def majority(rows: list[Row], same: Callable[[str, str], bool] = str.__eq__) -> Row | None:
    """The first row of the largest class of equal answers, the earlier class on a tie; None without an answer."""
    classes: list[list[Row]] = []
    for row in rows:
        if row["answer"] is None:
            continue
        home = next(
            (c for c in classes if same(c[0]["answer"].strip(), row["answer"].strip())), None
        )
        if home is None:
            classes.append([row])
        else:
            home.append(row)
    return max(classes, key=len)[0] if classes else None


def accuracy(
    rows: Iterable[Row], verdict: Callable[[Row], str] = lambda row: row["verdict"]
) -> dict[str, Any]:
    """{"accuracy", "n", "correct", "ci"} of rows, ungradable ones left out and counted as `ungradable`.

    With several samples a problem the mean over samples is the accuracy, and the interval is that of as many
    independent draws as there are problems, since samples of one problem are not independent.
    """
    per_problem: dict[str, list[bool]] = defaultdict(list)
    ungradable = 0
    for row in rows:
        if verdict(row) in UNGRADABLE:
            ungradable += 1
        else:
            per_problem[row["problem_id"]].append(verdict(row) == "correct")
    count = len(per_problem)
    share = sum(sum(found) / len(found) for found in per_problem.values()) / max(count, 1)
    low, high = wilson(share * count, count)
    result = {"accuracy": share, "n": count, "correct": share * count, "ci": [low, high]}
    if ungradable:
        result["ungradable"] = ungradable
    return result


def by(rows: list[Row], field: Callable[[Row], Any]) -> dict[str, dict[str, Any]]:
    """`accuracy` of each value of a field, in order; rows without the field under "unknown"."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        value = field(row)
        groups["unknown" if value is None else str(value)].append(row)
    return {name: accuracy(group) for name, group in sorted(groups.items())}


def summarise(
    rows: list[Row],
    headline: str = "greedy",
    k: tuple[int, ...] = (),
    same: Callable[[str, str], bool] = str.__eq__,
) -> dict[str, Any]:
    """All numbers of an evaluation.

    The headline form (accuracy, n, ci, by_level, by_subject) is of the `headline` decoding on every problem but the
    embedded ones of unseen templates, which stand apart under `by_set`.
    """
    decodings = {
        name: [row for row in rows if row["extra"]["decoding"] == name]
        for name in ("greedy", "sampled")
    }
    decodings = {name: found for name, found in decodings.items() if found}
    if headline not in decodings:
        headline = next(iter(decodings))
    result = _table(main_set(decodings[headline]))
    result["decoding"] = headline
    for name, found in decodings.items():
        result[name] = _table(main_set(found))
        result[name]["by_set"] = {
            label: _table(group)
            for label, group in _grouped(found, lambda row: row["extra"]["set"]).items()
        }
        result[name]["by_picture"] = by(
            main_set(found), lambda row: "with a picture" if row["images"] else "text only"
        )
    result["by_set"] = result[headline]["by_set"]
    if "sampled" in decodings:
        result["sampled"] |= _sample_metrics(main_set(decodings["sampled"]), k, same)
    return result


def main_set(
    rows: list[Any], set_of: Callable[[Any], str] = lambda row: row["extra"]["set"]
) -> list[Any]:
    """Without the embedded problems of unseen templates, where there are others."""
    seen = [row for row in rows if set_of(row) != "tiny:unseen"]
    return seen or rows


def _grouped(rows: list[Row], field: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[field(row)].append(row)
    return dict(groups)


def _table(rows: list[Row]) -> dict[str, Any]:
    result = accuracy(rows)
    result["by_level"] = by(rows, lambda row: row["level"])
    result["by_subject"] = by(rows, lambda row: row["subject"])
    lenient = [row for row in rows if "lenient_verdict" in row["extra"]]
    if lenient:
        result["lenient"] = accuracy(lenient, lambda row: row["extra"]["lenient_verdict"])
    lengths = [len(row["token_ids"]) for row in rows]
    result["mean_length"] = sum(lengths) / len(lengths)
    result["stop_reasons"] = dict(Counter(row["stop_reason"] for row in rows))
    result["no_answer"] = sum(row["verdict"] == "no_answer" for row in rows) / len(rows)
    return result


def _sample_metrics(
    rows: list[Row], k: tuple[int, ...], same: Callable[[str, str], bool]
) -> dict[str, Any]:
    """pass@k (unbiased) and maj@k (of the first k samples), means over problems.

    Samples that cannot be graded are left out of pass@k; they vote, and where they win their problem is left out.
    """
    every = _grouped(
        sorted(rows, key=lambda row: row["sample"]), lambda row: row["problem_id"]
    ).values()
    gradable = [[row for row in found if row["verdict"] not in UNGRADABLE] for found in every]
    metrics: dict[str, Any] = {"pass_at_k": {}, "maj_at_k": {}}
    for size in k:
        usable = [found for found in gradable if len(found) >= size]
        if usable:
            chances = [
                pass_at_k(len(f), sum(row["verdict"] == "correct" for row in f), size)
                for f in usable
            ]
            metrics["pass_at_k"][str(size)] = sum(chances) / len(chances)
        votes = [majority(found[:size], same) for found in every if len(found) >= size]
        verdicts = ["no_answer" if vote is None else vote["verdict"] for vote in votes]
        verdicts = [verdict for verdict in verdicts if verdict not in UNGRADABLE]
        if verdicts:
            right = verdicts.count("correct")
            metrics["maj_at_k"][str(size)] = {
                "accuracy": right / len(verdicts),
                "ci": list(wilson(right, len(verdicts))),
            }
    return metrics
