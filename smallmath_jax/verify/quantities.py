"""Values with units, in front (money) or behind; several like units add up (`3 hours 20 minutes`)."""

from fractions import Fraction

from smallmath_jax.verify import units
from smallmath_jax.verify.expressions import expression
from smallmath_jax.verify.normalise import Token, Unreadable
from smallmath_jax.verify.trees import Node, Reader, number, scalar, subscript

JOINERS = ("and", "or")
NEVER_LABELS = set(
    "not is isn isnt no or and if when where but than never false true cannot except unless else otherwise "
    "for which such that because since so x more less".split()
)
_FILLERS = ("per", "a", "an", "each", "of", "the")
_LETTERS = "smhgL"  # units of one letter, after a slash


def quantity(reader: Reader) -> Node:
    """A scalar or structure, with the unit that belongs to it."""
    if reader.take("$"):
        value = scalar(expression(reader))
        value = _multiplied(reader, value)
        _unit(reader)
        return Node("quantity", (value,), units.MONEY)
    if reader.peek().text == "-" and reader.peek(1).text == "$":
        reader.index += 2
        return Node("quantity", (Node("neg", (scalar(expression(reader)),)),), units.MONEY)
    node = expression(reader)
    if reader.take("$"):
        return Node("quantity", (scalar(node),), units.MONEY)
    node = _multiplied(reader, node)
    unit = _unit(reader)
    if unit is None or node.kind in ("tuple", "list", "set", "named_set"):  # `(3, 4) units`
        return node
    total = Node("quantity", (scalar(node),), unit)
    if reader.peek().text in ("*", "x", "by") and reader.peek(1).kind == "num":
        reader.index += 1
        right = quantity(reader)  # 4 ft x 12 ft
        return Node("list", (total, *(right.args if right.kind == "list" else (right,))), "x")
    while unit.known and reader.peek().kind == "num":
        total = _added(total, quantity(reader))
    return total


def _multiplied(reader: Reader, node: Node) -> Node:
    """`3 million`."""
    word = reader.peek()
    if word.kind != "word" or word.text.lower() not in units.MULTIPLIERS:
        return node
    reader.index += 1
    return Node("mul", (scalar(node), number(units.MULTIPLIERS[word.text.lower()])))


def _added(total: Node, more: Node) -> Node:
    if more.kind != "quantity" or more.value.powers != total.value.powers:
        raise Unreadable("quantities of different kinds side by side")
    scale = number(Fraction(more.value.scale) / total.value.scale)
    addend = Node("mul", (more.args[0], scale))
    return Node("quantity", (Node("add", (total.args[0], addend)),), total.value)


def _unit(reader: Reader) -> units.Unit | None:
    """The unit or label that follows, or None. Raises Unreadable for words that could change the meaning."""
    unit, power, divided, count = None, 1, False, 0
    while True:
        token = reader.peek()
        if _joins(reader) and unit is not None:
            divided = token.text == "/"
            reader.index += 1
            token = Token("word", reader.peek().text)
        if token.kind != "word" or token.text in JOINERS or token.text == "by":
            return unit
        word = token.text.lower()
        count += 1
        if word in NEVER_LABELS or count > 5:
            raise Unreadable(f"words after a number: {token.text!r}")
        reader.index += 1
        if word in _FILLERS or (word == "in" and unit is not None and not divided):
            divided = divided or word == "per"
        elif word in units.POWERS and unit is not None:
            unit = units.raised(unit, units.POWERS[word])
        elif word in units.POWERS:
            power = units.POWERS[word]
        else:
            piece = units.raised(units.unit_of(token.text), power * _exponent(reader))
            piece = units.raised(piece, -1) if divided else piece
            unit = piece if unit is None else units.times(unit, piece)
            power, divided = 1, False


def _joins(reader: Reader) -> bool:
    """Whether an operator joins two units: m/s, N*m, N-m."""
    token, after = reader.peek(), reader.peek(1)
    if token.kind != "op" or token.text not in ("/", "*", "-"):
        return False
    return after.kind == "word" or (after.kind == "let" and after.text in _LETTERS)


def _exponent(reader: Reader) -> int:
    if not reader.take("^"):
        return 1
    exponent = subscript(reader)
    if not exponent.lstrip("-").isdigit() or len(exponent) > 2:
        raise Unreadable("a unit with a strange power")
    return int(exponent)
