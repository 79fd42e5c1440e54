"""Sets of real numbers however they are written: intervals, unions, inequalities, builders, all reals, x != 3.

A region is a list of pieces (low, low closed, high, high closed) whose ends are trees. Ends that are constants are
sorted and merged; ends with variables are compared as they stand, in order.
"""

from typing import NamedTuple

from smallmath_jax.verify.evaluate import Undecided, real
from smallmath_jax.verify.policy import Policy
from smallmath_jax.verify.transform import has_signs
from smallmath_jax.verify.trees import SCALARS, Node
from smallmath_jax.verify.values import close, constant, same_value

INFINITY = Node("const", (), "inf")
MINUS_INFINITY = Node("neg", (INFINITY,))
_WRITTEN = (
    "union",
    "minus",
    "builder",
    "relation",
    "named_set",
    "cap",
)  # kinds that need this module


class Piece(NamedTuple):
    """An interval; a point has low == high and both ends closed."""

    low: Node
    low_closed: bool
    high: Node
    high_closed: bool


def equal_regions(gold: Node, answer: Node, policy: Policy) -> bool:
    """Whether two nodes are the same region. False where either is no region."""
    written = gold.kind in _WRITTEN or answer.kind in _WRITTEN
    if not written and not _lists_relations(gold, answer):
        return False
    names = _variable_of(gold), _variable_of(answer)
    if None not in names and names[0] != names[1]:
        return False
    if not policy.interval_as_inequality and _is_inequality(gold) != _is_inequality(answer):
        return False
    golds, answers = region(gold), region(answer)
    if golds is None or answers is None or len(golds) != len(answers):
        return False
    return all(_same_piece(g, a, policy) for g, a in zip(golds, answers, strict=True))


def _lists_relations(*nodes: Node) -> bool:
    return any(
        node.kind == "list" and any(item.kind == "relation" for item in node.args) for node in nodes
    )


def _variable_of(node: Node) -> str | None:
    """The variable inequalities are about; None for sets, which name none."""
    items = node.args if node.kind == "list" else (node,)
    names = {
        side.value
        for item in items
        if item.kind == "relation"
        for side in item.args
        if side.kind == "var"
    }
    return names.pop() if len(names) == 1 else None


def _is_inequality(node: Node) -> bool:
    items = node.args if node.kind == "list" else (node,)
    return any(item.kind == "relation" and "in" not in item.value for item in items)


def _same_piece(gold: Piece, answer: Piece, policy: Policy) -> bool:
    if (gold.low_closed, gold.high_closed) != (answer.low_closed, answer.high_closed):
        return False
    return same_value(gold.low, answer.low, policy) and same_value(gold.high, answer.high, policy)


def region(node: Node) -> list[Piece] | None:
    """The pieces of a region, in order, or None."""
    pieces = _pieces(node)
    return None if pieces is None else _merged(pieces)


def _pieces(node: Node) -> list[Piece] | None:
    if node.kind == "named_set":
        return [Piece(MINUS_INFINITY, False, INFINITY, False)] if node.value == "R" else None
    if node.kind == "tuple" and len(node.args) == 2:
        return _interval(node)
    if node.kind == "set":
        return _points(node.args)
    if node.kind == "union":
        return _union(node.args)
    if node.kind == "minus":
        return _difference(*node.args)
    if node.kind == "relation":
        return _inequality(node)
    if node.kind == "builder":
        return _builder(node)
    if node.kind == "list":
        return _joined(node)
    return None


def _interval(node: Node) -> list[Piece] | None:
    if any(arg.kind not in SCALARS or has_signs(arg) for arg in node.args):
        return None
    low, high = node.args
    return [Piece(low, node.value[0] == "[", high, node.value[1] == "]")]


def _points(args: tuple[Node, ...]) -> list[Piece] | None:
    if any(arg.kind not in SCALARS or has_signs(arg) for arg in args):
        return None
    return [Piece(arg, True, arg, True) for arg in args]


def _union(args: tuple[Node, ...]) -> list[Piece] | None:
    parts = [_pieces(arg) for arg in args]
    return None if None in parts else [piece for part in parts for piece in part]


def _difference(whole: Node, taken: Node) -> list[Piece] | None:
    """A region without finitely many points."""
    pieces, points = _pieces(whole), _pieces(taken)
    if pieces is None or points is None or any(point.low != point.high for point in points):
        return None
    for point in points:
        place = constant(point.low)
        if place is None:
            return None
        cut = []
        for piece in pieces:
            low, high = constant(piece.low), constant(piece.high)
            if low is None or high is None:
                return None
            if real(low) < real(place) < real(high):
                cut.append(piece._replace(high=point.low, high_closed=False))
                cut.append(piece._replace(low=point.low, low_closed=False))
            else:
                cut.append(piece)
        pieces = cut
    return pieces


def _inequality(node: Node) -> list[Piece] | None:
    """`x < 3`, `-1 < x <= 1`, `x != 3`, `x \\in S`: the values of its variable."""
    if len(node.value) == 1 and node.value[0] == "in":
        return _pieces(node.args[1]) if node.args[0].kind == "var" else None
    if any(side.kind not in SCALARS for side in node.args):
        return None
    signs, sides = node.value, node.args
    if all(sign in (">", ">=") for sign in signs):
        sides = sides[::-1]
        signs = tuple({">": "<", ">=": "<="}[sign] for sign in signs[::-1])
    if len(sides) == 3 and sides[1].kind == "var" and all(sign in ("<", "<=") for sign in signs):
        return [Piece(sides[0], signs[0] == "<=", sides[2], signs[1] == "<=")]
    if len(sides) != 2:
        return None
    if signs == ("!=",):
        point = sides[1] if sides[0].kind == "var" else sides[0]
        everything = Piece(MINUS_INFINITY, False, point, False)
        return [everything, Piece(point, False, INFINITY, False)]
    if signs[0] not in ("<", "<="):
        return None
    closed = signs[0] == "<="
    if sides[0].kind == "var" and constant(sides[1]) is not None:
        return [Piece(MINUS_INFINITY, False, sides[1], closed)]
    if sides[1].kind == "var" and constant(sides[0]) is not None:
        return [Piece(sides[0], closed, INFINITY, False)]
    return None


def _builder(node: Node) -> list[Piece] | None:
    """{x | conditions on x}: real membership adds nothing, one further condition is the region."""
    element, *conditions = node.args
    if element.kind == "relation" and element.value == ("in",):
        element = element.args[0]
    told = [condition for condition in conditions if not _is_real_membership(condition)]
    if element.kind != "var" or len(told) > 1:
        return None
    if not told:
        return [Piece(MINUS_INFINITY, False, INFINITY, False)]
    if told[0].kind != "relation" or not any(side == element for side in told[0].args):
        return None
    return _pieces(told[0])


def _is_real_membership(node: Node) -> bool:
    return (
        node.kind == "relation"
        and node.value == ("in",)
        and node.args[1] == Node("named_set", (), "R")
    )


def _joined(node: Node) -> list[Piece] | None:
    """Inequalities of one variable: joined by `or` (or a comma) they unite, by `and` they intersect."""
    names = set()
    for item in node.args:
        if item.kind != "relation":
            return None if node.value == "and" or item.kind != "tuple" else _union(node.args)
        names |= {side.value for side in item.args if side.kind == "var"}
    if len(names) != 1:
        return None
    signs = [sign for item in node.args for sign in item.value]
    if node.value != "and" and "!=" not in signs:
        return _union(node.args)
    if all(sign == "!=" for sign in signs):
        everything = Node("named_set", (), "R")
        points = [
            item.args[1] if item.args[0].kind == "var" else item.args[0] for item in node.args
        ]
        return _difference(everything, Node("set", tuple(points)))
    return _intersection([_pieces(item) for item in node.args])


def _intersection(parts: list[list[Piece] | None]) -> list[Piece] | None:
    """The common part of single intervals."""
    if any(part is None or len(part) != 1 for part in parts):
        return None
    pieces = [part[0] for part in parts]
    low = max(pieces, key=lambda piece: (_place(piece.low), not piece.low_closed))
    high = min(pieces, key=lambda piece: (_place(piece.high), piece.high_closed))
    return [Piece(low.low, low.low_closed, high.high, high.high_closed)]


def _place(node: Node):
    value = constant(node)
    if value is None:
        raise Undecided("an interval whose ends are no constants")
    return real(value)


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Constant pieces by order, those that touch or overlap as one."""
    if any(constant(end) is None for piece in pieces for end in (piece.low, piece.high)):
        return pieces
    pieces = sorted(pieces, key=lambda piece: (_place(piece.low), not piece.low_closed))
    merged: list[Piece] = []
    for piece in pieces:
        if not merged:
            merged.append(piece)
            continue
        last = merged[-1]
        gap = _place(piece.low) - _place(last.high) if not _infinite_pair(piece, last) else 0
        touching = close(_place(piece.low), _place(last.high)) and (
            piece.low_closed or last.high_closed
        )
        if not (gap < 0 and not close(_place(piece.low), _place(last.high)) or touching):
            merged.append(piece)
        elif _place(piece.high) > _place(last.high) or piece.high_closed:
            further = _place(piece.high) >= _place(last.high)
            if further:
                merged[-1] = last._replace(
                    high=piece.high,
                    high_closed=piece.high_closed or last.high_closed
                    if close(_place(piece.high), _place(last.high))
                    else piece.high_closed,
                )
    return merged


def _infinite_pair(piece: Piece, last: Piece) -> bool:
    return INFINITY in (piece.low, last.high) and piece.low == last.high
