"""What stands in brackets: grouped expressions, tuples, intervals, sets, builders, matrices, piecewise tables."""

from smallmath_jax.verify.normalise import Token, Unreadable
from smallmath_jax.verify.trees import DEPTH, Node, Reader, group_tokens, scalar


def group(reader: Reader, opening: str) -> Node:
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
    node = reader.listing(reader)
    if reader.take("choose"):
        node = Node("call", (scalar(node), scalar(reader.listing(reader))), "binom")
    reader.need("}")
    return Node("set", node.args) if node.kind == "list" else node


_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "langle": ("rangle",)}


def _tuple(reader: Reader, opening: str) -> Node:
    reader.need(opening)
    if opening == "(" and reader.take(")"):
        raise Unreadable("an empty bracket")
    node = reader.listing(reader)
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
    """\\{..\\}: listed elements, or an element and its conditions; a table is piecewise (\\left\\{ rows \\right.)."""
    reader.need("{{")
    if reader.take("}}"):
        return Node("set")
    if reader.peek().text in ("beg:array", "beg:cases", "beg:matrix"):
        table = _table(reader, loose=True)
        reader.take("}}")
        return table
    node = _before_bar(reader)
    if node is not None:
        conditions = reader.listing(reader)
        reader.need("}}")
        return Node(
            "builder", (node, *(conditions.args if conditions.kind == "list" else (conditions,)))
        )
    node = reader.listing(reader)
    reader.need("}}")
    items = node.args if node.kind == "list" else (node,)
    if all(item.kind == "relation" for item in items):
        return Node("list", tuple(items), ",")
    return Node("set", tuple(items))


def _before_bar(reader: Reader) -> Node | None:
    """The element of a builder, up to its bar; None, and no move, where there is no bar that separates."""
    start, depth = reader.index, reader.depth
    reader.bars += 1  # so that a bar is not taken to open an absolute value
    try:
        node = reader.listing(reader)
        if reader.take("|", "mid", ":", "rvert", "lvert"):
            return node
    except Unreadable:
        node = None  # read again below, bars and all
    finally:
        reader.bars -= 1
    reader.index, reader.depth = start, depth
    return None


def _table(reader: Reader, loose: bool = False) -> Node:
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
    loose = loose or name == "cases"
    cells = tuple(tuple(_cell(cell, reader, loose) for cell in row) for row in rows)
    kind = "cases" if loose else {"vmatrix": "determinant"}.get(name, "matrix")
    return Node(kind, cells)


def _cell(tokens: list[Token], reader: Reader, loose: bool) -> Node:
    while tokens and tokens[-1].text in (",", ";", "."):
        tokens = tokens[:-1]
    inner = Reader(tokens, reader.group, reader.listing, reader.words)
    inner.depth = reader.depth
    try:
        node = reader.listing(inner)
        if inner.peek().kind != "end":
            raise Unreadable("a cell with something left over")
        return node
    except Unreadable:
        if not loose:
            raise
        return reader.words(tokens)
