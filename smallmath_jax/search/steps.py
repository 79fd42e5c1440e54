"""The step grammar: what a candidate step is, the program it runs, the answer it gives, what the policy sees of output.

A trajectory is the plain concatenation of its steps (grammar `code_steps`):

    <code>\\n python <end_of_step> \\n python <end_of_step> ... \\n print(...)\\n<end_of_code>
    \\n<output>printed<end_of_output> \\n<answer>... \\boxed{...}.\\n<end_of_answer>

`<output>..` is appended by the search after `<end_of_code>`; everything else is the policy's. This module holds the
default rules; `rstar` holds those of the public code.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.tree import LiveNode
from smallmath_jax.verify.extract import find_answer

CODE, CODE_END, STEP_END = "<code>", "<end_of_code>", "<end_of_step>"
OUTPUT, OUTPUT_END = "<output>", "<end_of_output>"
ANSWER, ANSWER_END = "<answer>", "<end_of_answer>"
ENDINGS = (STEP_END, CODE_END, ANSWER_END)
OK = "ok"  # the status of a program that ran to its end

_MARKS = re.compile(r"<(?=/?(?:code|output|answer|end_of_(?:step|code|output|answer))>)")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One sampled step, as `generate` returns it."""

    text: str  # of token_ids, the ending mark included
    token_ids: Sequence[int]  # ending mark or EOS included
    log_prob: float  # sum over token_ids, under the sampling distribution
    stop_reason: str  # eos | stop | length
    handle: Any = None  # where generation continues after it; None: made by append


@dataclasses.dataclass(frozen=True)
class CodeResult:
    """What `run_code` returns of one snippet: the three attributes of `verify.sandbox`'s Result that are read here."""

    status: str  # "ok", or why it failed: error, timeout, killed, ...
    stdout: str = ""  # what this step printed, exact; not what the prefix printed
    stderr_tail: str = ""  # the end of its standard error, last line "Type: message"


class Step(NamedTuple):
    """A candidate read by the grammar."""

    kind: str  # open | answer | invalid
    answer: str | None = None
    runs: bool = False  # its code is to be executed


def ending(text: str) -> str:
    """The mark a step ends in, or ""."""
    body = text.rstrip()
    return next((mark for mark in ENDINGS if body.endswith(mark)), "")


def body(text: str) -> str:
    """A step without its ending mark."""
    mark = ending(text)
    return text.rstrip().removesuffix(mark) if mark else text


def read_step(candidate: Candidate) -> Step:
    """What a candidate is: a step of code, an answer, or neither.

    An answer is what <end_of_answer> closes, or a box in a text that EOS ended; a code line that mentions a box is
    code. A candidate that ran into the token limit, that ended without a mark, or whose answer is empty can lead
    nowhere: it is invalid, and never continued.
    """
    mark = ending(candidate.text)
    if mark in (STEP_END, CODE_END):
        return Step("open", runs=True)
    finished = mark == ANSWER_END or candidate.stop_reason == "eos"
    answer = find_answer(candidate.text).answer if finished else None
    return Step("answer", answer) if answer else Step("invalid")


class Kept(NamedTuple):
    candidates: list[Candidate]
    duplicates: int
    dropped: int  # beside an answer


def filter_candidates(candidates: Sequence[Candidate], settings: SearchSettings) -> Kept:
    """Distinct candidates; once one closes an answer, only the first `answers_kept` distinct answers.

    Two steps are the same when their text is, but for white space at the ends; unlike the public code, one that ends
    the program is not the same as one that goes on.
    """
    first: dict[str, Candidate] = {}
    for one in candidates:
        first.setdefault(one.text.strip(), one)
    kept = list(first.values())
    duplicates = len(candidates) - len(kept)
    answers: dict[str | None, Candidate] = {}
    for one in kept:
        step = read_step(one)
        if step.kind == "answer":
            answers.setdefault(step.answer, one)
    chosen = list(answers.values())[: settings.answers_kept] if answers else kept
    return Kept(chosen, duplicates, len(kept) - len(chosen))


def code_of(text: str) -> str:
    """The Python of one step: what stands behind <code> (if it is there) and before its ending mark."""
    text = text.rpartition(CODE)[2]
    return re.split("|".join((CODE_END, STEP_END, OUTPUT)), text, maxsplit=1)[0]


def block(parent: LiveNode) -> list[LiveNode]:
    """The steps of the code block a child of `parent` would continue, oldest first: those since <end_of_code>."""
    steps: list[LiveNode] = []
    node: LiveNode | None = parent
    while node is not None and node.parent is not None:
        if CODE_END in node.text or OUTPUT_END in node.text:
            break
        steps.append(node)
        node = node.parent
    return steps[::-1]


def program(parent: LiveNode, text: str) -> tuple[str, str]:
    """(prefix, code) of a step: what ran before it in its code block, and its own Python.

    A step that failed is left out of later prefixes, as a failed cell of a notebook leaves nothing to repeat; the
    public code repeats it, so that all below it fail too. Nothing else is shared between two executions.
    """
    prefix = "".join(code_of(step.text) for step in block(parent) if step.status in ("", OK))
    return prefix, code_of(text)


def shown_output(parent: LiveNode, result: Any, settings: SearchSettings) -> str:
    """What is appended after <end_of_code>: all the block printed, or the last line of the error."""
    if result.status == OK:
        printed = "".join(step.output for step in block(parent)) + result.stdout
    else:
        printed = error_line(result)
    printed = _MARKS.sub("< ", clip(printed.strip(), settings.output_characters))
    return f"\n{OUTPUT}{printed}{OUTPUT_END}"


def error_line(result: Any) -> str:
    """The last line of an error, or the status where there is none (a killed program writes none)."""
    lines = [line for line in result.stderr_tail.splitlines() if line.strip()]
    return lines[-1].strip() if lines else result.status


def clip(text: str, characters: int) -> str:
    """A text that is too long, as its first and last half."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}...{text[len(text) - half :]}"
