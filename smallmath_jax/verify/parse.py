r"""Tokens to answers: lists, tuples, intervals, sets, relations, matrices, quantities, words.

Kinds of structure nodes (beside the scalars of `expressions`):
tuple (value: its two brackets), set, list (value: the word that joins: "," | "or" | "and"), union, cap, minus,
named_set, builder (args: element, conditions...), relation (value: operators between the args), ratio, time, based,
quantity (value: Unit), both (a statement given twice, `-1<x<1:(-1,1)`), cases, text (value: letters and digits).
"""

import re

from smallmath_jax.verify import brackets, spelling
from smallmath_jax.verify.normalise import Token, Unreadable, canonical
from smallmath_jax.verify.quantities import JOINERS, NEVER_LABELS, quantity
from smallmath_jax.verify.trees import Node, Reader, subscript

RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "approx", "sim", "in", "notin", "subset", "subseteq")
_LEADING = (
    "about",
    "approximately",
    "approx",
    "around",
    "exactly",
    "roughly",
    "is",
    "are",
    "only",
    "equals",
)


def parse_answer(tokens: list[Token]) -> Node:
    """The whole of the tokens as one answer. Raises Unreadable."""
    if not tokens:
        raise Unreadable("nothing there")
    reader = Reader(tokens, brackets.group, _list, text_answer)
    node = _list(reader)
    if reader.peek().kind != "end":
        raise Unreadable(f"{reader.peek().text!r} left over")
    return node


def text_answer(tokens: list[Token]) -> Node:
    """An answer in words: its letters and digits, in lower case, under a common name where several say the same."""
    value = re.sub(r"[\s{}().,:;'\"$]", "", canonical(tokens)).casefold()
    known = spelling.SENTENCES.get(value)
    if known == "emptyset":
        return Node("set")
    if known == "reals":
        return Node("named_set", (), "R")
    if known == "infty":
        return Node("const", (), "inf")
    return Node("text", (), known or value)


def _list(reader: Reader) -> Node:
    """Statements joined by commas, semicolons, `and`, `or`; one alone is itself."""
    items, joiner = [_statement(reader)], ","
    while True:
        separated = False
        while reader.take(",", ";", "land", "lor"):
            separated = True
        word = reader.peek()
        if word.kind == "word" and word.text in JOINERS:
            reader.index += 1
            joiner, separated = word.text, True
        if not separated:
            break
        items.append(_statement(reader))
    if len(items) == 1:
        return items[0]
    return Node("list", tuple(_carry_name(items)), joiner)


def _carry_name(items: list[Node]) -> list[Node]:
    """`x = -1, 0, 1`: the name belongs to every value."""
    first = items[0]
    if first.kind != "relation" or first.value != ("=",) or first.args[0].kind != "var":
        return items
    if any(item.kind in ("relation", "text", "both") for item in items[1:]):
        return items
    name = first.args[0]
    return [first, *(Node("relation", (name, item), ("=",)) for item in items[1:])]


def _statement(reader: Reader) -> Node:
    """A side, or sides with relations between them; `a : b` is a ratio of scalars, else a statement given twice."""
    while reader.peek().kind == "word" and reader.peek().text.lower() in _LEADING:
        reader.index += 1
    clock = _time(reader)
    if clock is not None:
        return clock
    start = reader.index
    if reader.take("=", "approx", "sim", "therefore", "implies"):
        start = reader.index
    sides, operators = [_name(reader) or _side(reader)], []
    while reader.peek().kind == "op" and reader.peek().text in RELATIONS:
        operators.append({"approx": "~", "sim": "~"}.get(reader.peek().text, reader.peek().text))
        reader.index += 1
        sides.append(_side(reader))
    node = Node("relation", tuple(sides), tuple(operators)) if operators else sides[0]
    if reader.index == start:
        raise Unreadable("an empty statement")
    if reader.peek().text != ":" or reader.bars:
        return node
    return _colon(reader, node)


def _colon(reader: Reader, node: Node) -> Node:
    if node.kind == "var" and (labelled := _labelled(reader, node)):
        return labelled
    parts = [node]
    while reader.take(":"):
        parts.append(_statement(reader) if node.kind == "relation" else _side(reader))
    if all(
        part.kind in ("num", "dec", "var", "call", "div", "mul", "add", "pow") for part in parts
    ):
        return Node("ratio", tuple(parts))
    if len(parts) == 2 and node.kind == "relation":
        return Node("both", tuple(parts))
    raise Unreadable("a colon between things that make no ratio")


def _labelled(reader: Reader, node: Node) -> Node | None:
    """`J: 4 hours`: a colon before a quantity names it."""
    start = reader.index
    reader.index += 1
    if reader.peek().kind == "num":
        value = _side(reader)
        if value.kind == "quantity":
            return Node("relation", (node, value), ("=",))
    reader.index = start
    return None


def _time(reader: Reader) -> Node | None:
    """`3:30`, `1:03 PM`, `5 am`: hours, minutes and half of the day."""
    hour, colon, minute = reader.peek(), reader.peek(1), reader.peek(2)
    if hour.kind != "num" or not hour.text.isdigit() or len(hour.text) > 2:
        return None
    count, minutes = 1, "00"
    if colon.text == ":" and minute.kind == "num" and re.fullmatch(r"[0-5]\d", minute.text):
        count, minutes = 3, minute.text
    half = reader.peek(count)
    marked = half.kind == "word" and half.text.lower() in ("am", "pm")
    if not marked and (
        count == 1 or half.kind not in ("end",) and half.text not in (",", "and", "or")
    ):
        return None
    reader.index += count + marked
    return Node("time", (), (int(hour.text), int(minutes), half.text.lower() if marked else ""))


_NAME = re.compile(r"[A-Za-z]\w{0,12}'*(?:\^\{?-1\}?)?\([A-Za-z0-9,]{1,12}\)")


def _name(reader: Reader) -> Node | None:
    """The left side of a definition: words, or a function of letters, before `=`: `\\text{Area} = `, `A(3) = `."""
    if not reader.named:
        return None
    ahead = reader.tokens[reader.index : reader.index + 17]
    count = next((i for i, token in enumerate(ahead) if token.text in ("=", ":")), 0)
    if not count or any(token.text in _NO_NAME for token in ahead[:count]):
        return None
    written = canonical(ahead[:count])
    if all(token.kind == "word" for token in ahead[:count]):
        if len(written) < 2 or written.lower() in NEVER_LABELS:
            return None
        reader.index += count
        return _side(reader) if reader.take(":") else Node("var", (), written.lower())
    if ahead[count].text == ":" or _APPLIED.fullmatch(written) or not _NAME.fullmatch(written):
        return None  # f(x) is read as an expression: it may stand on either side
    reader.index += count
    return Node("var", (), written)


_NO_NAME = ("+", "*", "/", "<", ">", "<=", ">=", "frac", ";")
_APPLIED = re.compile(r"(?!x)[A-Za-z]'*(?:\^\{?-1\}?)?\([A-Za-z]\)")


_SETS = {"cup": "union", "cap": "cap", "setminus": "minus"}


def _side(reader: Reader) -> Node:
    """Sets joined by \\cup, \\cap, \\setminus, or one quantity."""
    node = _part(reader)
    while True:
        token = reader.peek()
        united = token.kind == "let" and token.text in "uU" and _between_intervals(reader)
        if not united and not (token.kind == "op" and token.text in _SETS):
            return node
        kind = "union" if united else _SETS[token.text]
        reader.index += 1
        if reader.peek().text in (",", ";"):  # a slip of the pen some answer keys have
            reader.index += 1
        right = _part(reader)
        same = kind == "union" and node.kind == "union"
        node = Node(kind, (*node.args, right) if same else (node, right))


def _part(reader: Reader) -> Node:
    """A quantity, or \\bigcup_{k} of a set that depends on k: the range as it is written, and the set."""
    if reader.peek().text != "cup" or reader.peek(1).text not in "_^":
        return quantity(reader)
    start = reader.index
    reader.index += 1
    while reader.peek().kind == "op" and reader.peek().text in ("_", "^"):
        reader.index += 1
        subscript(reader)
    written = canonical(reader.tokens[start : reader.index])
    return Node("family", (_side(reader),), written)


def _between_intervals(reader: Reader) -> bool:
    before = reader.tokens[reader.index - 1].text if reader.index else ""
    return before in (")", "]", "}}") and reader.peek(1).text in ("(", "[", "{{")
