"""Grading a file of answers. Host-only: no jax is loaded."""

import collections
import json
from typing import Any

from etils import epath
from tqdm import tqdm

from smallmath_jax.records import write_part
from smallmath_jax.verify.grader import Grader


def run(config: Any, workdir: str) -> None:
    """Writes WORKDIR/verdicts.jsonl, whole or not at all, and prints the counts."""
    if not config.pairs:
        raise ValueError("say which file to grade: --config.pairs=FILE (JSONL of id, gold, pred)")
    pairs = read_pairs(config.pairs)
    rows = []
    with Grader() as grader:
        for number, pair in tqdm(pairs, desc="grade", unit="pair"):
            if config.bare:
                graded = grader.grade_answer(pair["gold"], pair["pred"])
            else:
                graded = grader.grade(pair["gold"], pair["pred"], mode=config.extraction)
            rows.append(
                {
                    "id": pair.get("id", number),
                    "verdict": graded.verdict,
                    "extracted": graded.extracted,
                }
            )
        asked = grader.counters().get("fallback", 0)
    write_part(workdir, "verdicts.jsonl", rows)
    counts = collections.Counter(row["verdict"] for row in rows)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    print(
        f"{len(rows)} graded: {told}; {asked} second opinions; {epath.Path(workdir) / 'verdicts.jsonl'}"
    )


def read_pairs(path: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, {id, gold, pred}) of a JSONL file. Raises ValueError naming file, line and field."""
    source = epath.Path(path)
    if not source.exists():
        raise FileNotFoundError(f"{path}: no such file")
    pairs = []
    for number, line in enumerate(source.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON object ({error}); mend or remove the line"
            ) from error
        for field in ("gold", "pred"):
            if not isinstance(pair, dict) or not isinstance(pair.get(field), str):
                raise ValueError(
                    f"{path}, line {number}: field {field!r} must be a text; mend the line"
                )
        pairs.append((number, pair))
    return pairs
