r"""Tokens to answers: lists, tuples, intervals, sets, relations, matrices, quantities, words.

Kinds of structure nodes (beside the scalars of `expressions`):
tuple (value: its two brackets), set, list (value: the word that joins: "," | "or" | "and"), union, cap, minus,
named_set, builder (args: element, conditions...), relation (value: operators between the args), ratio, time, based,
quantity (value: Unit), both (a statement given twice, `-1<x<1:(-1,1)`), cases, text (value: letters and digits).
"""

import re
from fractions import Fraction

from smallmath_jax.verify import spelling, units
from smallmath_jax.verify.expressions import expression
from smallmath_jax.verify.normalise import Token, Unreadable, canonical
from smallmath_jax.verify.trees import DEPTH, Node, Reader, group_tokens, number, scalar, subscript

RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "approx", "sim", "in", "notin", "subset", "subseteq")
_JOINERS = {"and": "and", "or": "or"}
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
_NEVER_LABELS = set(
    "not is isn isnt no or and if when where but than never false true cannot except unless else otherwise "
    "for which such that because since so x more less".split()
)


def parse_answer(tokens: list[Token]) -> Node:
    """The whole of the tokens as one answer. Raises Unreadable."""
    if not tokens:
        raise Unreadable("nothing there")
    reader = Reader(tokens, _group)
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
        if word.kind == "word" and word.text in _JOINERS:
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
    """The left side of a definition: words, or a function of letters, before `=`: `\\text{Area} = `, `f(x) = `."""
    end = reader.index
    words = reader.tokens[end].kind == "word" if end < len(reader.tokens) else False
    while end < len(reader.tokens) and reader.tokens[end].text not in ("=", ":", ",", "+", "*"):
        words = words and reader.tokens[end].kind == "word"
        end += 1
        if end - reader.index > 16:
            return None
    if end >= len(reader.tokens) or end == reader.index:
        return None
    stop = reader.tokens[end].text
    written = canonical(reader.tokens[reader.index : end])
    if stop in "=:" and words and len(written) > 1 and written.lower() not in _NEVER_LABELS:
        reader.index = end + (stop == ":")
        if stop == ":":
            return _side(reader)
        return Node("var", (), written.lower())
    if stop == "," or not _NAME.fullmatch(written.replace("*", "")):
        if stop != "," or not _NAME.match(written):
            return None
        stop_at = _closing(reader, end)
        if stop_at is None or not _NAME.fullmatch(canonical(reader.tokens[reader.index : stop_at])):
            return None
        end = stop_at
    if reader.tokens[end].text != "=":
        return None
    name = canonical(reader.tokens[reader.index : end])
    reader.index = end
    return Node("var", (), name)


def _closing(reader: Reader, end: int) -> int | None:
    """Where the `=` after a function of several letters stands: `f(x,y) =`."""
    for index in range(end, min(end + 8, len(reader.tokens))):
        if reader.tokens[index].text == "=":
            return index
    return None


_SETS = {"cup": "union", "cap": "cap", "setminus": "minus"}


def _side(reader: Reader) -> Node:
    """Sets joined by \\cup, \\cap, \\setminus, or one quantity."""
    node = _quantity(reader)
    while True:
        token = reader.peek()
        united = token.kind == "let" and token.text in "uU" and _between_intervals(reader)
        if not united and not (token.kind == "op" and token.text in _SETS):
            return node
        kind = "union" if united else _SETS[token.text]
        reader.index += 1
        if reader.peek().text in (",", ";"):  # a slip of the pen some answer keys have
            reader.index += 1
        right = _quantity(reader)
        same = kind == "union" and node.kind == "union"
        node = Node(kind, (*node.args, right) if same else (node, right))


def _between_intervals(reader: Reader) -> bool:
    before = reader.tokens[reader.index - 1].text if reader.index else ""
    return before in (")", "]", "}}") and reader.peek(1).text in ("(", "[", "{{")


def _quantity(reader: Reader) -> Node:
    """A scalar with its unit, in front (money) or behind; several like units add up (`3 hours 20 minutes`)."""
    if reader.take("$"):
        value = scalar(expression(reader))
        _unit(reader)
        return Node("quantity", (value,), units.MONEY)
    if reader.peek().text == "-" and reader.peek(1).text == "$":
        reader.index += 2
        return Node("quantity", (Node("neg", (scalar(expression(reader)),)),), units.MONEY)
    node = expression(reader)
    if reader.take("$"):
        return Node("quantity", (scalar(node),), units.MONEY)
    word = reader.peek()
    if word.kind != "word" or word.text in _JOINERS:
        return node
    if word.text.lower() in units.MULTIPLIERS:
        reader.index += 1
        node = Node("mul", (scalar(node), number(units.MULTIPLIERS[word.text.lower()])))
    unit = _unit(reader)
    if unit is None:
        return node
    if node.kind in ("tuple", "list", "set", "named_set"):  # `(3, 4) units`
        return node
    total = Node("quantity", (scalar(node),), unit)
    while unit.known and reader.peek().kind == "num":
        more = _quantity(reader)
        if more.kind != "quantity" or more.value.powers != unit.powers:
            raise Unreadable("quantities of different kinds side by side")
        scale = number(Fraction(more.value.scale) / unit.scale)
        addend = Node("mul", (more.args[0], scale))
        total = Node("quantity", (Node("add", (total.args[0], addend)),), unit)
    return total


def _unit(reader: Reader) -> units.Unit | None:
    """The unit or label that follows, or None. Raises Unreadable for words that could change the meaning."""
    unit, power, count = None, 1, 0
    divided = False
    while True:
        token = reader.peek()
        if token.kind != "word" or token.text in _JOINERS:
            if (
                token.kind == "op"
                and token.text in ("/", "*", "-")
                and reader.peek(1).kind == "word"
                and unit
            ):
                divided = token.text == "/"
                reader.index += 1
                continue
            return unit
        word = token.text.lower()
        count += 1
        if word in _NEVER_LABELS or count > 5:
            raise Unreadable(f"words after a number: {token.text!r}")
        reader.index += 1
        if word in ("per", "a", "an", "each", "of", "the", "in", "each") and (unit or word != "in"):
            divided = divided or word == "per"
            continue
        if word in units.POWERS:
            if unit is not None:
                unit = units.raised(unit, units.POWERS[word])
            else:
                power = units.POWERS[word]
            continue
        piece = units.raised(units.unit_of(token.text), power)
        power = 1
        if reader.take("^"):
            exponent = subscript(reader)
            if not exponent.lstrip("-").isdigit() or len(exponent) > 2:
                raise Unreadable("a unit with a strange power")
            piece = units.raised(piece, int(exponent))
        piece = units.raised(piece, -1) if divided else piece
        unit = piece if unit is None else units.times(unit, piece)
        divided = False


def _group(reader: Reader, opening: str) -> Node:
    """What stands in brackets: a grouped expression, or a structure. Moves past the closing bracket."""
    reader.depth += 1
    if reader.depth > DEPTH:
        raise Unreadable(f"nested more than {DEPTH} deep")
    bars, reader.bars = reader.bars, 0
    if opening == "beg":
        node = _table(reader)
    elif opening == "{{":
        node = _set(reader)
    elif opening == "{":
        node = _brace(reader)
    else:
        node = _tuple(reader, opening)
    reader.bars = bars
    reader.depth -= 1
    return node


def _brace(reader: Reader) -> Node:
    """A {..} group: an expression; several items make a set (plain text has no \\{)."""
    reader.need("{")
    if reader.take("}"):
        raise Unreadable("an empty group")
    node = _list(reader)
    reader.need("}")
    return Node("set", node.args) if node.kind == "list" else node


_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "langle": ("rangle",)}


def _tuple(reader: Reader, opening: str) -> Node:
    reader.need(opening)
    if opening == "(" and reader.take(")"):
        raise Unreadable("an empty bracket")
    node = _list(reader)
    closing = reader.peek().text
    if closing not in _CLOSING[opening]:
        raise Unreadable(f"{opening!r} closed by {closing!r}")
    reader.index += 1
    if node.kind != "list":
        if (opening == "[") != (closing == "]"):
            raise Unreadable("brackets that do not match")
        return node
    if all(item.kind == "relation" for item in node.args):  # [x = 2, y = 4]
        return node
    if opening == "langle":
        return Node("tuple", node.args, "()")
    return Node("tuple", node.args, opening + closing)


def _set(reader: Reader) -> Node:
    """\\{..\\}: listed elements, or an element and its conditions."""
    reader.need("{{")
    if reader.take("}}"):
        return Node("set")
    first = _set_item(reader)
    if reader.take("|", "mid", ":", "rvert", "lvert"):
        conditions = _list(reader)
        reader.need("}}")
        items = conditions.args if conditions.kind == "list" else (conditions,)
        return Node("builder", (first, *items))
    items = [first]
    while reader.take(",", ";") or (reader.peek().text == "and" and reader.peek().kind == "word"):
        if reader.peek().text == "and":
            reader.index += 1
        items.append(_statement(reader))
    reader.need("}}")
    if all(item.kind == "relation" for item in items):
        return Node("list", tuple(items), ",")
    return Node("set", tuple(items))


def _set_item(reader: Reader) -> Node:
    """The first element; a bar after it separates, so it may open no absolute value unless the set starts with one."""
    if reader.peek().text == "|":
        return _statement(reader)
    reader.bars += 1
    try:
        node = expression(reader)
        if reader.peek().kind == "op" and reader.peek().text in RELATIONS:
            operators, sides = [], [node]
            while reader.peek().kind == "op" and reader.peek().text in RELATIONS:
                operators.append(reader.peek().text)
                reader.index += 1
                sides.append(_side(reader))
            return Node("relation", tuple(sides), tuple(operators))
        return node
    finally:
        reader.bars -= 1


def _table(reader: Reader) -> Node:
    """A matrix or \\cases environment: rows of cells, each an answer of its own."""
    name = reader.peek().text.partition(":")[2]
    reader.index += 1
    if name == "array" and reader.peek().text == "{":
        group_tokens(reader)
    rows: list[list[list[Token]]] = [[[]]]
    depth = 0
    while True:
        token = reader.peek()
        if token.kind == "end":
            raise Unreadable("a matrix is not closed")
        reader.index += 1
        if token.text == f"end:{name}" and depth == 0:
            break
        depth += token.text.startswith("beg:") - token.text.startswith("end:")
        if depth == 0 and token.text == "&":
            rows[-1].append([])
        elif depth == 0 and token.text == "\\\\":
            rows.append([[]])
        else:
            rows[-1][-1].append(token)
    rows = [row for row in rows if any(row)]
    if not rows or len(rows) > 40 or max(len(row) for row in rows) > 40:
        raise Unreadable("a matrix without rows, or beyond 40 x 40")
    cells = tuple(tuple(_cell(cell, reader, name) for cell in row) for row in rows)
    kind = {"cases": "cases", "vmatrix": "determinant"}.get(name, "matrix")
    return Node(kind, cells)


def _cell(tokens: list[Token], reader: Reader, name: str) -> Node:
    while tokens and tokens[-1].text in (",", ";", "."):
        tokens = tokens[:-1]
    inner = Reader(tokens, _group)
    inner.depth = reader.depth
    try:
        node = _list(inner)
        if inner.peek().kind != "end":
            raise Unreadable("a cell with something left over")
        return node
    except Unreadable:
        if name != "cases":
            raise
        return text_answer(tokens)
