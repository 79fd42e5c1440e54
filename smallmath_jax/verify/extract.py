"""Finding the final answer in a completion. Sizes are capped before anything is searched."""

import dataclasses
import re

TAIL = 20_000  # characters of a completion that are searched, from its end
ANSWER = 2_000  # characters of an answer; longer ones are never equal to anything
MODES = ("strict", "lenient")

_BOX_MARKS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_PHRASE = re.compile(
    r"(?:final answer|answer|result|solution)s?\s*(?:(?:is|are|was|equals?|would be)\b\s*:?|:|=)\s*"
    r"(?!\s*$)",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####[ \t]*(\S[^\n]{0,200})")
_MATH = re.compile(
    r"\$\$([^$]{1,2000})\$\$|\$([^$\n]{1,2000})\$|\\\((.{1,600}?)\\\)|\\\[(.{1,600}?)\\\]",
    re.DOTALL,
)
_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?")
_JOINT = re.compile(
    r"[\s$.,;:&]*(?:\\\\|\\quad|\\text\{\s*(?:and|or)\s*\}|and|or|,)?[\s$,;&]*", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Extracted:
    """An answer and the rule that found it: answer_tag, box, boxes, hashes, phrase, math, number (or none)."""

    answer: str | None
    rule: str = "none"


def extract(text: str, mode: str = "strict", prefix: str = "") -> str | None:
    """The final answer of prefix + text, or None. See `find_answer`."""
    return find_answer(text, mode, prefix).answer


def find_answer(text: str, mode: str = "strict", prefix: str = "") -> Extracted:
    r"""The last complete <answer>..</answer> (or ..<end_of_answer>), in it or else the last complete \boxed.

    `strict` looks after the thinking only: a box inside <think>, closed or not, is no answer. `lenient` (evaluation
    only) goes on, over the whole text: neighbouring boxes as one list, `#### x`, "the answer is x", the last $..$,
    the last number. Only the last 20,000 characters are searched. Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown extraction mode {mode!r}; known: {', '.join(MODES)}")
    whole = prefix + text
    found = _strict(_after_thinking(whole))
    if mode == "strict":
        return found
    tail = whole[-TAIL:]
    return _join_boxes(tail, found) if found.answer is not None else _lenient(tail)


def _after_thinking(whole: str) -> str:
    """The tail of what follows the last </think>; nothing while a <think> stands open."""
    closed = whole.rfind("</think>")
    if whole.rfind("<think>") > closed:
        return ""
    start = closed + len("</think>") if closed >= 0 else 0
    return whole[max(start, len(whole) - TAIL) :]


def _strict(text: str) -> Extracted:
    tagged = _last_tag(text)
    if tagged is None:
        box = last_box(text)
        return Extracted(None) if box is None or not box.strip() else Extracted(_cap(box), "box")
    box = last_box(tagged)
    answer = (tagged if box is None else box).strip()
    return Extracted(_cap(answer), "answer_tag") if answer else Extracted(None, "answer_tag")


def _last_tag(text: str) -> str | None:
    """The content of the last complete answer block, by either grammar."""
    end = max(text.rfind("</answer>"), text.rfind("<end_of_answer>"))
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


def _cap(answer: str) -> str:
    return answer.strip()[: ANSWER + 1]  # one more than is ever graded


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""All complete \boxed{..} and \fbox{..} as (start, end, content), by where they end. One pass."""
    stack: list[
        tuple[int, int] | None
    ] = []  # (start of the command, start of the content), None for a bare brace
    found = []
    for match in _BOX_MARKS.finditer(text):
        mark = match.group()
        if mark == "{":
            stack.append(None)
        elif mark == "}":
            opened = stack.pop() if stack else None
            if opened is not None:
                found.append((opened[0], match.end(), text[opened[1] : match.start()]))
        elif len(mark) > 2:
            stack.append((match.start(), match.end()))
    return found


def last_box(text: str) -> str | None:
    r"""Content of the box that closes last; a box that holds nothing but a box is unwrapped, up to 3 times."""
    found = boxes(text)
    if not found:
        return None
    content = found[-1][2]
    for _ in range(3):
        inner = boxes(content)
        if not inner or content.strip() != content[inner[-1][0] : inner[-1][1]]:
            break
        content = inner[-1][2]
    return content


def _join_boxes(text: str, found: Extracted) -> Extracted:
    """Lenient only: outermost boxes that stand beside each other (`\\boxed{1} and \\boxed{2}`) are one list."""
    if found.rule != "box":
        return found
    outer: list[tuple[int, int, str]] = []
    for box in reversed(boxes(text)):
        if not outer or box[1] <= outer[-1][0]:
            outer.append(box)
    joined = [outer[0]]
    for box in outer[1:]:
        if not _JOINT.fullmatch(text[box[1] : joined[-1][0]][:40]):
            break
        joined.append(box)
    if len(joined) == 1:
        return found
    return Extracted(_cap(", ".join(box[2] for box in reversed(joined))), "boxes")


def _lenient(text: str) -> Extracted:
    found = _strict(text)  # once more, the thinking included
    if found.answer is not None:
        return _join_boxes(text, found)
    hashes = _HASHES.findall(text)
    if hashes:
        return Extracted(_cap(hashes[-1]), "hashes")
    phrases = list(_PHRASE.finditer(text))
    if phrases:
        answer = _sentence(text[phrases[-1].end() :][:ANSWER])
        if answer:
            return Extracted(_cap(answer), "phrase")
    maths = list(_MATH.finditer(text))
    if maths:
        return Extracted(_cap(next(group for group in maths[-1].groups() if group)), "math")
    numbers = _NUMBER.findall(text)
    return Extracted(numbers[-1], "number") if numbers else Extracted(None)


def _sentence(text: str) -> str:
    """The rest of a sentence; of one that holds mathematics, the mathematics (all of it, with what joins it)."""
    end = re.search(r"\.\s|\.$|\n\s*\n|\bI hope\b", text)
    part = text[: end.start()] if end else text
    maths = list(_MATH.finditer(text[: end.start() + 1] if end else text))
    if maths:
        return text[maths[0].start() : maths[-1].end()]
    return part.strip()
