"""Whether two scalar trees have the same value: exactly, or at seeded random points to a relative 1e-25.

Points come in kinds, positive and negative, inside and outside (-1, 1), rational and whole, so that |x| is not x, an
arcsine has somewhere to live and n! has whole numbers. A point where a side has no real value tells nothing, unless
one side writes an absolute value: then it tells the two apart.
"""

import dataclasses
import itertools
import math
import random
from fractions import Fraction

from smallmath_jax.verify.evaluate import (
    Number,
    Scope,
    Undecided,
    Undefined,
    context,
    evaluate,
    is_exact,
    real,
)
from smallmath_jax.verify.policy import Policy
from smallmath_jax.verify.trees import Node, children

VARIABLES = 24  # at most, in one comparison
RELATIVE = 25  # digits that must agree
_FLOOR = 40  # digits below the largest addend where a difference is cancellation noise


# Ranges of coordinates, (low, high, kind of sign, whole numbers): tried in this order.
_RANGES = (
    (1.2, 3.2, "+", False),
    (0.1, 3.5, "+-", False),
    (0.1, 0.95, "+", False),
    (0.2, 2.5, "-", False),
    (2, 9, "+", True),
    (0.1, 0.9, "-+", False),
    (6, 20, "+", False),
    (4, 15, "+", True),
    (25, 60, "+", False),
    (40, 90, "+", False),
    (700, 990, "+", True),
    (3_000, 8_000, "+-", True),
)
_ALWAYS = (
    4  # points that are tried however the first ones turn out; the rest where those are not enough
)


def _points() -> list[list[Fraction]]:
    """A point of 24 coordinates for each range, fixed for all time."""
    draw = random.Random(20261122)
    points = []
    for low, high, signs, whole in _RANGES:
        bottoms = (1,) if whole else (7, 11, 13, 17, 9)
        point = []
        for index in range(VARIABLES):
            bottom = bottoms[index % len(bottoms)]
            top = draw.randint(math.ceil(low * bottom), math.floor(high * bottom))
            sign = -1 if signs[index % len(signs)] == "-" else 1
            point.append(Fraction(sign * (top if top % bottom or whole else top + 1), bottom))
        points.append(point)
    return points


_POINTS = _points()


def free_variables(node: Node) -> set[str]:
    """Names of the variables a scalar tree contains."""
    if node.kind == "var":
        return {node.value}
    names: set[str] = set()
    for child in children(node):
        names |= free_variables(child)
    return names - {node.value[1]} if node.kind == "series" else names


def contains(node: Node, kind: str, value: str | None = None, size: int | None = None) -> bool:
    """Whether a tree has a node of a kind (and value, and number of arguments)."""
    here = node.kind == kind and (value is None or node.value == value)
    if here and (size is None or len(node.args) == size):
        return True
    return any(contains(child, kind, value, size) for child in children(node))


def same_value(gold: Node, answer: Node, policy: Policy) -> bool:
    """Whether two scalar trees without \\pm are equal under a policy. Raises Undecided."""
    return any(
        _same(gold, answer, gold_scope, answer_scope, policy)
        for gold_scope, answer_scope in _conventions(gold, answer, policy)
    )


def _conventions(gold: Node, answer: Node, policy: Policy) -> list[tuple[Scope, Scope]]:
    """The readings of %, degree signs and bare logarithms under which the two may agree."""
    has_percent = [contains(node, "pct") for node in (gold, answer)]
    percents = [True]
    if has_percent[0] != has_percent[1] and policy.percent_as_number:
        percents.append(False)
    degrees = [False]
    if policy.degrees_as_radians and any(contains(node, "deg") for node in (gold, answer)):
        degrees.append(True)
    logs = [0, 10] if any(contains(node, "call", "log", 1) for node in (gold, answer)) else [0]
    return [
        (Scope({}, degree, percent, log), Scope({}, degree, percent, log))
        for percent, degree, log in itertools.product(percents, degrees, logs)
    ]


def _same(gold: Node, answer: Node, gold_scope: Scope, answer_scope: Scope, policy: Policy) -> bool:
    names = sorted(free_variables(gold) | free_variables(answer))
    if not names:
        try:
            values = evaluate(gold, gold_scope), evaluate(answer, answer_scope)
        except Undefined:
            return False
        if close(*values, gold_scope, answer_scope):
            return True
        if gold_scope.unknown or answer_scope.unknown:
            raise Undecided("a series that only stands for itself")
        return _rounded(gold, answer, values, policy) or _rounded(
            answer, gold, values[::-1], policy
        )

    def agree(first: Number, second: Number, scopes: tuple[Scope, Scope]) -> bool:
        return close(first, second, *scopes)

    return _at_points(gold, answer, (gold_scope, answer_scope), names, agree)


def _at_points(
    gold: Node, answer: Node, scopes: tuple[Scope, Scope], names: list[str], agree
) -> bool:
    """Whether two trees agree wherever both have a value; raises Undecided where hardly anywhere both do."""
    if len(names) > VARIABLES:
        raise Undecided(f"more than {VARIABLES} variables")
    stepped = any(
        contains(node, "call", name) for node in (gold, answer) for name in ("floor", "ceil")
    )
    absolute = contains(gold, "call", "abs") != contains(answer, "call", "abs")
    usable, complex_pairs = 0, []
    for index, coordinates in enumerate(_POINTS):
        if index >= (len(_POINTS) if stepped else _ALWAYS) and usable >= 3:
            break
        point = dict(zip(names, coordinates, strict=False))
        told = (
            dataclasses.replace(scopes[0], point=point),
            dataclasses.replace(scopes[1], point=point),
        )
        values = [_value(node, scope) for node, scope in zip((gold, answer), told, strict=True)]
        unreal = [
            value is None or _left_reals(scope) for value, scope in zip(values, told, strict=True)
        ]
        if any(unreal):
            if absolute and not all(unreal):
                return False
            if None not in values:
                complex_pairs.append((*values, told))
            continue
        if not agree(*values, told):
            if any(scope.unknown for scope in told):
                raise Undecided("a series that only stands for itself")
            return False
        usable += 1
    if usable < 2 and not (len(complex_pairs) > 2 and all(agree(*pair) for pair in complex_pairs)):
        raise Undecided("hardly any point where both sides have a real value")
    return True


def _value(node: Node, scope: Scope) -> Number | None:
    """The value at a point, None where there is none."""
    try:
        return evaluate(node, scope)
    except Undefined:
        return None


def _left_reals(scope: Scope) -> bool:
    """Whether a real expression has no real value here."""
    return scope.left_reals and not scope.imaginary


def close(first: Number, second: Number, *scopes: Scope) -> bool:
    """Equality: exact for exact numbers, else to a relative 1e-25, noise of cancellation aside."""
    if is_exact(first) and is_exact(second):
        return first == second
    mp = context()
    first, second = real(first), real(second)
    if mp.isnan(first) or mp.isnan(second):
        raise Undecided("not a number")
    if mp.isinf(first) or mp.isinf(second):
        return bool(first == second)
    gap = abs(first - second)
    if gap <= max(abs(first), abs(second)) * mp.mpf(10) ** -RELATIVE:
        return True
    largest = max((scope.largest for scope in scopes), default=0)
    return bool(gap <= largest * mp.mpf(10) ** -_FLOOR)


def _rounded(exact: Node, decimal: Node, values: tuple[Number, Number], policy: Policy) -> bool:
    """Whether a decimal of enough digits rounds, or cuts off, a number that has no finite decimal."""
    inner = decimal.args[0] if decimal.kind == "neg" else decimal
    if not policy.decimal_digits or inner.kind != "dec" or inner.value[1] < policy.decimal_digits:
        return False
    value, approximation = values
    if not isinstance(value, (int, Fraction, context().mpf)) or contains(exact, "dec"):
        return False
    if is_exact(value) and _terminates(Fraction(value)):
        return False
    leading = context().floor(context().log10(abs(real(approximation)))) if approximation else 0
    unit = context().mpf(10) ** (int(leading) + 1 - inner.value[1])
    return bool(abs(real(value) - real(approximation)) < unit)


def _terminates(value: Fraction) -> bool:
    bottom = value.denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    return bottom == 1


def proportional(gold: Node, answer: Node, positive: bool) -> bool:
    """Whether two differences agree up to a constant factor, which must be positive where order matters."""
    if not any(contains(node, "call", "log", 1) for node in (gold, answer)):
        return _proportional(gold, answer, positive, 0)
    return any(_proportional(gold, answer, positive, base) for base in (0, 10))


def _proportional(gold: Node, answer: Node, positive: bool, log_base: int) -> bool:
    names = sorted(free_variables(gold) | free_variables(answer))
    factors: list[Number] = []

    def agree(first: Number, second: Number, scopes: tuple[Scope, Scope]) -> bool:
        zeros = [
            close(value, 0, scope) for value, scope in zip((first, second), scopes, strict=True)
        ]
        if any(zeros):
            return all(zeros)
        exact = is_exact(first) and is_exact(second)
        factor = Fraction(second) / Fraction(first) if exact else real(second) / real(first)
        if not factors:
            factors.append(factor)
            if positive and not (isinstance(factor, (Fraction, context().mpf)) and factor > 0):
                return False
        return _near(factor, factors[0])

    if not names:
        raise Undecided("a relation without variables")
    return _at_points(
        gold, answer, (Scope({}, log_base=log_base), Scope({}, log_base=log_base)), names, agree
    )


def _near(first: Number, second: Number) -> bool:
    if is_exact(first) and is_exact(second):
        return first == second
    first, second = real(first), real(second)
    return bool(
        abs(first - second) <= max(abs(first), abs(second)) * context().mpf(10) ** -RELATIVE
    )


def constant(node: Node) -> Number | None:
    """The real value of a scalar without variables, or None."""
    if free_variables(node):
        return None
    try:
        value = evaluate(node, Scope({}))
    except Undefined:
        return None
    return value if is_exact(value) or isinstance(value, context().mpf) else None
