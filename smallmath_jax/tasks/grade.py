"""Grading a file of (gold, prediction) pairs: JSONL in, JSONL out, no model and no accelerator."""

import json
from collections import Counter
from typing import Any, NamedTuple

from etils import epath
from tqdm import tqdm

from smallmath_jax.records import write_part
from smallmath_jax.verify.grader import VERDICTS, Graded, Grader


class Pair(NamedTuple):
    """One line of the file."""

    id: Any
    gold: str
    pred: str


def run(config: Any, workdir: str) -> None:
    """Grades `config.pairs` into workdir/verdicts.jsonl, in input order, written whole.

    All lines are read before the first is graded: a bad one stops the task and is named with file, line and field
    (ValueError), and so is a missing file (FileNotFoundError).
    """
    if not config.pairs:
        raise ValueError(
            "say which file to grade: --config.pairs=FILE, a JSONL of id, gold and pred"
        )
    pairs = load_pairs(config.pairs)
    mode = "lenient" if config.mode == "lenient" else "strict"
    rows, verdicts = [], Counter()
    with Grader() as grader:
        for pair in tqdm(pairs, desc="grade", unit="pair"):
            graded = _grade(grader, pair, mode, bool(config.bare))
            verdicts[graded.verdict] += 1
            rows.append({"id": pair.id, "verdict": graded.verdict, "extracted": graded.extracted})
        fallback = grader.counters()["fallback"]
    write_part(workdir, "verdicts.jsonl", rows)
    print(summary(verdicts, fallback))
    print(f"verdicts in {epath.Path(workdir) / 'verdicts.jsonl'}")


def _grade(grader: Grader, pair: Pair, mode: str, bare: bool) -> Graded:
    if bare:
        return grader.grade_answer(pair.gold, pair.pred)
    return grader.grade(pair.gold, pair.pred, mode)


def load_pairs(path: str) -> list[Pair]:
    """The pairs of a JSONL file; empty lines are passed over. Raises ValueError naming file, line and field."""
    source = epath.Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{path}: no such file (--config.pairs)")
    pairs = []
    for number, line in enumerate(source.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            pairs.append(_pair(line, f"{path}, line {number}"))
    return pairs


def _pair(line: str, where: str) -> Pair:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON object ({error}); is the line torn?") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: a JSON object with id, gold and pred is wanted, not {line[:40]!r}"
        )
    for field in Pair._fields:
        if field not in row:
            raise ValueError(f"{where}: field {field!r} is missing; the line has {sorted(row)}")
        kinds = (str, int, float) if field != "id" else (str, int)
        if not isinstance(row[field], kinds) or isinstance(row[field], bool):
            raise ValueError(f"{where}: field {field!r} is {row[field]!r}; write it as text")
    return Pair(row["id"], str(row["gold"]), str(row["pred"]))


def summary(verdicts: Counter, fallback: int) -> str:
    """How many pairs got which verdict, and how many needed a second opinion."""
    total = sum(verdicts.values())
    share = lambda count: f"{count} ({count / total:.1%})" if total else "0"
    told = ", ".join(f"{name} {share(verdicts[name])}" for name in VERDICTS)
    return f"{total} pairs: {told}; math-verify was asked for {share(fallback)}"
