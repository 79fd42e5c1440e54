r"""Answers: finding them in text and saying whether they are equal. The public face of extraction and comparison.

`compare` never runs model text: it normalises both sides alike, reads them with a bounded parser of its own and
compares structure, then values, exactly or to 40 digits (`policy` lists what is a choice). What it cannot read or
decide, and what is worth a second opinion, it calls `undecided`: `grader` then asks math-verify in a child process.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from smallmath_jax.verify import equal as structures
from smallmath_jax.verify.evaluate import TooLarge, Undecided
from smallmath_jax.verify.extract import ANSWER, Extracted, extract, find_answer
from smallmath_jax.verify.normalise import (
    Token,
    Unreadable,
    canonical,
    clean,
    has_two_readings,
    tokenise,
)
from smallmath_jax.verify.parse import parse_answer, text_answer
from smallmath_jax.verify.policy import DEFAULT, Policy
from smallmath_jax.verify.trees import Node, numeral

__all__ = ["ANSWER", "Extracted", "Policy", "compare", "extract", "find_answer", "gradable", "read"]

PROSE = (
    24  # letters outside commands from which a gold answer is prose: equal only to the same words
)
_CHOICE = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{\s*)*(?i:option|choice|answer)?:?\s*"
    r"(?:\(\s*(?P<bracketed>[A-Za-z])\s*\)|(?P<plain>[A-Z])(?=\s*(?:[).:}]|$)))\s*[).:}\s]*(?P<rest>.*)",
    re.DOTALL,
)
_PLAIN = re.compile(r"-?[0-9]{1,40}(?:\.[0-9]{1,40})?")
_IMPLAUSIBLE = (
    "sum",
    "int",
    "lim",
    "prod",
)  # the second opinion is not asked for these when only the answer has them


class Reading(NamedTuple):
    """An answer as read: canonical text, tokens, and its trees (two where a comma may mean two things)."""

    text: str  # cleaned
    canonical: str
    tokens: tuple[Token, ...]
    nodes: tuple[Node, ...]
    error: str  # why there are no nodes


@lru_cache(maxsize=8192)
def read(text: str) -> Reading:
    """Reads an answer; never raises."""
    if _PLAIN.fullmatch(text):
        return _read_number(text)
    try:
        cleaned = clean(text)
        variants = [tokenise(cleaned)]
        if has_two_readings(cleaned):
            variants.append(tokenise(cleaned, commas="inside"))
    except (Unreadable, RecursionError) as error:
        return Reading("", "", (), (), str(error))
    nodes, message = [], ""
    for tokens in variants:
        try:
            nodes.append(parse_answer(tokens))
        except (Unreadable, RecursionError, ValueError) as error:
            message = str(error)
    if not nodes and any(token.kind == "word" for token in variants[0]):
        nodes = [text_answer(variants[0])]
    return Reading(cleaned, canonical(variants[0]), tuple(variants[0]), tuple(nodes), message)


def _read_number(text: str) -> Reading:
    """A plain number, which most answers are, without the tokeniser's detours."""
    digits = text.removeprefix("-")
    node, tokens = numeral(digits), (Token("num", digits),)
    if digits != text:
        node, tokens = Node("neg", (node,)), (Token("op", "-"), *tokens)
    return Reading(text, text, tokens, (node,), "")


def compare(gold: str, answer: str, policy: Policy = DEFAULT) -> str:
    """`correct`, `wrong`, `undecided` (ask math-verify) or `unparsable_gold`. The gold answer comes first, always."""
    told, said = read(gold), read(answer)
    if not told.canonical:
        return "unparsable_gold"
    if not said.canonical:
        return "wrong"
    if told.canonical == said.canonical:
        return "correct"
    choice = _compare_choices(told, said, policy)
    if choice:
        return choice
    undecided = False
    for told_node in told.nodes:
        for said_node in said.nodes:
            try:
                if structures.equal(told_node, said_node, policy):
                    return "correct"
            except (TooLarge, RecursionError):
                continue  # nobody would compute that in time
            except Undecided:
                undecided = True
    if is_prose(told):
        return "unparsable_gold"
    if told.nodes and said.nodes and not undecided:
        return "wrong"
    return "undecided" if _plausible(told, said) else "wrong"


def gradable(gold: str) -> bool:
    """Whether answers can be compared with this gold by more than their words: ask it of all golds at load time."""
    told = read(gold)
    return bool(told.canonical) and not is_prose(told)


def is_prose(told: Reading) -> bool:
    """Whether an answer is a sentence: no two people would write it alike."""
    letters = sum(len(token.text) for token in told.tokens if token.kind == "word")
    return letters >= PROSE and (not told.nodes or told.nodes[0].kind == "text")


def _compare_choices(told: Reading, said: Reading, policy: Policy) -> str:
    """A gold that is a choice letter, alone or with its text; "" where it is none."""
    gold = _CHOICE.fullmatch(told.text.strip("$ ."))
    if gold is None or not policy.choice_with_text:
        return ""
    letter = gold.group("bracketed") or gold.group("plain")
    answer = _CHOICE.fullmatch(said.text.strip("$ ."))
    if answer is None:
        bare = said.canonical.strip("(){}.")
        return (
            "correct" if len(bare) == 1 and bare.upper() == letter and letter in "ABCDEFGH" else ""
        )
    chosen = answer.group("bracketed") or answer.group("plain")
    if chosen.upper() != letter.upper():
        return "wrong"
    rests = [re.sub(r"[\s${}.]", "", match.group("rest")) for match in (gold, answer)]
    return "correct" if not all(rests) or rests[0] == rests[1] else ""


def _plausible(told: Reading, said: Reading) -> bool:
    """Whether a second opinion may find the two equal, and cannot be led astray."""
    golds, answers = [token.text for token in told.tokens], [token.text for token in said.tokens]
    if any(token.kind == "unk" and token.text not in golds for token in said.tokens):
        return False
    if any(word in answers and word not in golds for word in _IMPLAUSIBLE):
        return False
    if golds.count("=") > 1 or any(text.startswith("beg:") for text in (*golds, *answers)):
        return False  # of a chain of equations it compares but one, of a table sometimes a part
    if any(
        answers.count(opening) != answers.count(closing)
        for opening, closing in ("{}", ("{{", "}}"))
    ):
        return False
    words = sum(len(token.text) for token in said.tokens if token.kind == "word")
    if words >= PROSE or any(node.kind == "text" for node in (*told.nodes, *said.nodes)):
        return False
    if _skeleton(told) == _skeleton(said):
        return False  # the same but for its numbers
    return len(said.tokens) <= 200 and not any(len(text) > 60 for text in answers)


def _skeleton(reading: Reading) -> list[str]:
    return [token.text for token in reading.tokens if token.kind != "num"]
