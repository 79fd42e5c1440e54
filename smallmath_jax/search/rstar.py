"""The rules of the public rStar-Math code (microsoft/rStar, branch rStar-math, commit b3c1846), faults included.

Used under compat="rstar", to compare with it and to read its trees. What it does differently from `steps` by fault or
by accident is said at each function; the search never uses this module by default.
"""

import inspect
import re
from collections.abc import Sequence
from typing import Any

from smallmath_jax.records import Node, Tree
from smallmath_jax.search import interpreter
from smallmath_jax.search.steps import (
    ANSWER_END,
    CODE,
    CODE_END,
    OUTPUT,
    OUTPUT_END,
    STEP_END,
    Candidate,
    Kept,
    Step,
    ending,
)
from smallmath_jax.search.tree import LiveNode

# Its markers of failed leaves, word for word: they are in its data files.
FAILURES = {
    "Too many consecutive steps have code errors.": "error",
    "Fail to sove the problem within limited steps.": "too_deep",
    "Fail to generate parsable text for next step.": "invalid",
}
SENTENCE = "Let's think step by step and solve the problem with code."
PROMPTS = {
    "train": 1,
    "search": 2,
}  # line breaks before <|assistant|>: it trains on one prompt and searches with another


def prompt(question: str, partial: str = "", use: str = "search") -> str:
    """Its zero-shot prompt. One line break stands before the assistant's turn in training data, two in search.

    By default a search has one prompt, its root's, and training data carries token ids behind that same prompt.
    Raises ValueError for another use.
    """
    if use not in PROMPTS:
        raise ValueError(f"no rStar prompt for {use!r}; known: {', '.join(PROMPTS)}")
    return f"<|user|>:\n{question}{chr(10) * PROMPTS[use]}<|assistant|>: {SENTENCE}{partial}"


def filter_candidates(candidates: Sequence[Candidate]) -> Kept:
    """Exact duplicates go, the ending mark ignored; if any ends an answer, only the first such is kept."""
    seen: set[str] = set()
    kept = []
    for one in candidates:
        text = one.text.removesuffix(ending(one.text))
        if text not in seen:
            seen.add(text)
            kept.append(one)
    answers = [one for one in kept if one.text.endswith(ANSWER_END)]
    chosen = answers[:1] or kept
    return Kept(chosen, len(candidates) - len(kept), len(kept) - len(chosen))


def read_step(text: str) -> Step:
    """A step with the word "boxed" is an answer, wherever it stands; all others are Python."""
    if "boxed" not in text:
        return Step("open", runs=True)
    answer = extract_answer(text)
    return Step("answer", answer) if answer else Step("open")


def extract_answer(text: str) -> str:
    r"""The last \boxed of the text before its first ".\n": a box behind the first sentence is lost.

    Without a box the whole sentence is the answer. One \text{..} is unwrapped; an "and" in it goes.
    """
    sentence = text.split(".\n")[0].strip().removesuffix(".").strip()
    start = sentence.rfind("\\boxed{")
    boxed = sentence if start < 0 else _last_box(sentence[start:], start)
    at = boxed.find("\\text{")
    if at < 0:
        return boxed
    end = _closing(boxed[at:])
    if end is None:
        return "[invalid]"
    inside = boxed[at + len("\\text{") : at + end].strip()
    return (boxed[:at] + ("" if inside == "and" else inside) + boxed[at + end + 1 :]).strip()


def _last_box(text: str, offset: int) -> str:
    """The content of a \\boxed at the start of `text`; one that never closes is cut where its code happens to cut."""
    opened: list[int] = []
    start = offset
    for index, character in enumerate(text):
        if character == "{":
            opened.append(index)
        elif character == "}":
            start = opened.pop()
            if not opened:
                return text[start + 1 : index]
    return text[start + 1 :]


def _closing(text: str) -> int | None:
    """Where the first brace of the text closes."""
    depth = 0
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "}" and depth == 0:
            return index
    return None


def extract_program(text: str) -> str:
    """Its program of a text: the lines with <code> and <end_of_code> are lost, with the code on them."""
    lines, inside = [], False
    text = text.replace(STEP_END, "")
    for line in text.split("\n"):
        if CODE in line:
            lines.append("\n# ========\n")
            inside = True
        elif CODE_END in line:
            inside = False
        elif inside:
            lines.append(line + "\n")
    return ("".join(lines) or text).strip()


def history(node: LiveNode | None) -> list[str]:
    """The steps whose code runs again before a child's: up to an ancestor that ended its program, that one excluded."""
    steps: list[str] = []
    while node is not None and OUTPUT_END not in node.text and CODE_END not in node.text:
        if node.text and "boxed" not in node.text:
            steps.append(node.text)
        node = node.parent
    return steps[::-1]


def program(parent: LiveNode, text: str) -> tuple[str, str]:
    """("", program) that prints what its interpreter would have shown: see `observing`."""
    return "", observing(extract_program("".join(history(parent)) + text))


def observing(code: str) -> str:
    """A program that runs `code` as its interpreter does and prints the observation.

    Variables lie in one dict of the process, as they do there: who runs several programs in one process gets its
    leaking state. The sandbox gives each program a process of its own, so a search over it shows that fault nowhere.
    """
    names = 'globals().setdefault("kept_names", {})'
    return f"{inspect.getsource(interpreter)}\n\nprint(observe({code!r}, {names}))\n"


def observation(result: Any) -> str:
    """Its observation of a step; a program that was killed is a TimeoutError to it."""
    if result.status == "ok":
        return result.stdout.strip()
    return (
        result.stderr_tail.strip() or f"TimeoutError: the program ended with status {result.status}"
    )


def failed(observed: str) -> bool:
    """Its error rule: the word anywhere in the output, "standard error: 0.3" included."""
    return "error" in observed.lower()


def wrapped(observed: str) -> str:
    return f"{OUTPUT}{observed}{OUTPUT_END}"


def step_text(text: str, observed: str, terminal: bool) -> str:
    """A step's text with its output. Of a terminal failure that ended its program the output is wrapped twice."""
    if terminal:
        inner = wrapped(observed) if CODE_END in text else observed
        return f"{text if CODE_END in text else text + CODE_END}\n{wrapped(inner)}"
    return f"{text}\n{wrapped(observed)}" if CODE_END in text else text


# ---- its data files


def tree_from_states(states: dict[str, dict[str, Any]], gold: str, problem_id: str = "") -> Tree:
    """A Tree of one of its saved search trees (tag -> text, q_value, visit_count, value, final_answer ...).

    Texts are kept; token ids are not in its files. A leaf's verdict is read off its value, as its own extraction
    does: exactly +1 or -1, since only trees of sampling hold the truth. Its first values are not told apart from
    scores, so `score` is left out. Raises ValueError when the root is missing.
    """
    if "0" not in states:
        raise ValueError(
            f"tree of problem {problem_id!r} has no root '0'; is it one of rStar-Math's?"
        )
    nodes, waiting = [], ["0"]
    while waiting:
        tag = waiting.pop(0)
        children = [f"{tag}.{index}" for index in range(1, len(states) + 1)]
        below = [child for child in children if child in states]
        nodes.append(_node(tag, states[tag], leaf=not below))
        waiting += below
    question = states["0"].get("extra_info", "").removeprefix("question: ")
    return Tree(problem_id=problem_id or question, problem=question, gold=gold, nodes=nodes)


def _node(tag: str, state: dict[str, Any], leaf: bool) -> Node:
    final, value = state.get("final_answer", ""), state["q_value"]
    kind = "root" if tag == "0" else FAILURES.get(final, "answer" if final and leaf else "open")
    verdict = {1: "correct", -1: "wrong"}.get(value, "") if kind == "answer" else ""
    visits = state["visit_count"]
    return Node(
        tag=tag,
        text=state["text"],
        token_ids=[],
        written=0,
        log_prob=0.0,
        kind=kind,
        visit_count=visits,
        value_sum=value * visits,
        answer=final if kind == "answer" else None,
        verdict=verdict,
    )


_BLANKS = re.compile(r"\s+")


def same_prompt(first: str, second: str) -> bool:
    """Whether two prompts differ in nothing but white space, as its two forms do."""
    return _BLANKS.sub(" ", first) == _BLANKS.sub(" ", second)
