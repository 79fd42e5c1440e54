"""The report's sample completions: the same problems through every evaluation of a run, and completion lengths."""

import hashlib
import re
from typing import Any

from smallmath_jax.records import read_parts
from smallmath_jax.report import plots
from smallmath_jax.report.markup import escape, picture

Row = dict[str, Any]
SHOWN = 12
# What a chat template and an image processor put around the words of a problem.
CHAT_MARKS = re.compile(
    r"<\|im_start\|>(system|user|assistant)\n?|<\|(im_end|vision_start|vision_end|image_pad|video_pad|end|user|"
    r"assistant|system)\|>:?"
)


def sections(evaluations: dict[str, dict[str, Any]], pictures: Any) -> dict[str, str]:
    """Section title -> HTML; empty without completions."""
    own = {
        n: f for n, f in evaluations.items() if n in ("before", "after", "evaluation")
    } or evaluations
    tables = {name: _by_problem(found) for name, found in own.items()}
    tables = {name: found for name, found in tables.items() if found}
    if not tables:
        return {}
    cards = [_card(problem, tables) for problem in chosen_problems(tables)]
    note = "<p class=note>Chosen by hash of the problem's id, problems with pictures first.</p>"
    lengths = {n: [len(row["token_ids"]) for row in found.values()] for n, found in tables.items()}
    return {
        "Completion lengths": pictures("lengths", plots.length_histogram, lengths),
        "Sample completions": note + "".join(cards) if cards else "",
    }


def chosen_problems(tables: dict[str, dict[str, Row]]) -> list[str]:
    """Problems that every evaluation answered, half of them with pictures, chosen by hash and not by eye."""
    shared = set.intersection(*(set(found) for found in tables.values()))
    order = sorted(shared, key=lambda problem: hashlib.sha256(problem.encode()).hexdigest())
    first = next(iter(tables.values()))
    pictured = [problem for problem in order if first[problem].get("images")][: SHOWN // 2]
    plain = [problem for problem in order if problem not in pictured]
    return pictured + plain[: SHOWN - len(pictured)]


def _by_problem(found: dict[str, Any]) -> dict[str, Row]:
    """problem id -> the first completion of the headline decoding."""
    decoding = found["result"].get("decoding")
    return {
        row["problem_id"]: row
        for row in read_parts(found["folder"] / "completions")
        if row["sample"] == 0 and row["extra"].get("decoding") in (decoding, None)
    }


def _card(problem: str, tables: dict[str, dict[str, Row]]) -> str:
    row = next(iter(tables.values()))[problem]
    shown = "".join(picture(image) for image in row.get("images") or ())
    question = escape(CHAT_MARKS.sub("", row["prompt"]).strip())
    words = [f"level {row['level']}" if row.get("level") else "", row.get("subject") or ""]
    about = escape(" · ".join(word for word in words if word))
    answers = "".join(
        f"<div><h4>{escape(name)} {badge(found[problem]['verdict'])}</h4>"
        f"<pre>{escape(found[problem]['text'])}</pre></div>"
        for name, found in tables.items()
    )
    return (
        f"<article class=sample><div class=question>{shown}<div><p>{question}</p>"
        f"<p class=gold>right answer <b>{escape(row['gold'])}</b>{' · ' + about if about else ''}</p>"
        f"<details><summary>the prompt as the model reads it</summary><pre>{escape(row['prompt'])}</pre></details>"
        f"</div></div><div class=answers>{answers}</div></article>"
    )


def badge(verdict: str) -> str:
    """A verdict as a coloured word, with a sign for those who do not see the colour."""
    sign = {"correct": "✓ ", "wrong": "✗ "}.get(verdict, "")
    colour = {"correct": " right", "wrong": " wrong"}.get(verdict, "")
    word = verdict.replace("_", " ") or "not graded"
    return f'<span class="badge{colour}">{sign}{escape(word)}</span>'
