"""Whether two scalar trees have the same value: exactly, or at seeded random points to a relative 1e-25.

Points come in kinds, positive and negative, inside and outside (-1, 1), rational and whole, so that |x| is not x, an
arcsine has somewhere to live and n! has whole numbers. A point where a side has no real value tells nothing, unless
one side writes an absolute value: then it tells the two apart.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable
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
from smallmath_jax.verify.trees import Node, free_variables, survey

VARIABLES = 24  # at most, in one comparison
RELATIVE = 83  # bits that must agree: 25 digits
_FLOOR = 133  # bits (40 digits) below the largest addend where a difference is cancellation noise


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


def same_value(gold: Node, answer: Node, policy: Policy) -> bool:
    """Whether two scalar trees without \\pm are equal under a policy. Raises Undecided."""
    told, said = survey(gold), survey(answer)
    names = sorted(told.names | said.names)
    for percent, degree, log in _conventions(told.traits, said.traits, policy):
        scopes = (Scope({}, degree, percent, log), Scope({}, degree, percent, log))
        if not names:
            same = _same_constant(gold, answer, scopes, policy)
        else:
            same = _at_points(gold, answer, scopes, names, told.traits ^ said.traits, _close_in)
        if same:
            return True
    return False


def _conventions(
    told: set[str], said: set[str], policy: Policy
) -> Iterable[tuple[bool, bool, int]]:
    """The readings of %, degree signs and bare logarithms under which the two may agree."""
    one_percent = ("pct" in told) != ("pct" in said) and policy.percent_as_number
    degrees = policy.degrees_as_radians and "deg" in told | said
    logs = (0, 10) if "bare log" in told | said else (0,)
    percents = (True, False) if one_percent else (True,)
    return itertools.product(percents, (False, True) if degrees else (False,), logs)


def _same_constant(gold: Node, answer: Node, scopes: tuple[Scope, Scope], policy: Policy) -> bool:
    try:
        values = evaluate(gold, scopes[0]), evaluate(answer, scopes[1])
    except Undefined:
        return False
    if close(*values, *scopes):
        return True
    if any(scope.unknown for scope in scopes):
        raise Undecided("a series that only stands for itself")
    return _rounded(gold, answer, values, policy) or _rounded(answer, gold, values[::-1], policy)


def _close_in(first: Number, second: Number, scopes: tuple[Scope, Scope]) -> bool:
    return close(first, second, *scopes)


def _at_points(
    gold: Node,
    answer: Node,
    scopes: tuple[Scope, Scope],
    names: list[str],
    differ: set[str],
    agree: Callable[[Number, Number, tuple[Scope, Scope]], bool],
) -> bool:
    """Whether two trees agree wherever both have a value; raises Undecided where hardly anywhere both do.

    `differ` are the traits only one of them has.
    """
    if len(names) > VARIABLES:
        raise Undecided(f"more than {VARIABLES} variables")
    steps = {"floor", "ceil"} & (
        survey(gold).traits | differ
    )  # flat almost everywhere: look widely
    usable, complex_pairs = 0, []
    for index, coordinates in enumerate(_POINTS):
        if index >= (len(_POINTS) if steps else _ALWAYS) and usable >= 3:
            break
        point = dict(zip(names, coordinates, strict=False))
        told = tuple(dataclasses.replace(scope, point=point) for scope in scopes)
        values = [_value(node, scope) for node, scope in zip((gold, answer), told, strict=True)]
        unreal = [
            value is None or _left_reals(scope) for value, scope in zip(values, told, strict=True)
        ]
        if any(unreal):
            if "abs" in differ and not all(unreal):
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
    first, second = real(first), real(second)
    mp = context()
    if mp.isnan(first) or mp.isnan(second):
        return False  # infinity minus infinity is no answer
    if mp.isinf(first) or mp.isinf(second):
        return bool(first == second)
    gap = abs(first - second)
    if gap <= mp.ldexp(max(abs(first), abs(second)), -RELATIVE):
        return True
    largest = max((scope.largest for scope in scopes), default=0)
    return bool(largest and gap <= mp.ldexp(largest, -_FLOOR))


def _rounded(exact: Node, decimal: Node, values: tuple[Number, Number], policy: Policy) -> bool:
    """Whether a decimal of enough digits rounds, or cuts off, a number that has no finite decimal."""
    inner = decimal.args[0] if decimal.kind == "neg" else decimal
    if not policy.decimal_digits or inner.kind != "dec" or inner.value[1] < policy.decimal_digits:
        return False
    value, approximation = values
    if not isinstance(value, (int, Fraction, context().mpf)) or "dec" in survey(exact).traits:
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
    logs = (0, 10) if "bare log" in survey(gold).traits | survey(answer).traits else (0,)
    return any(_proportional(gold, answer, positive, base) for base in logs)


def _proportional(gold: Node, answer: Node, positive: bool, log_base: int) -> bool:
    told, said = survey(gold), survey(answer)
    names = sorted(told.names | said.names)
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
    scopes = (Scope({}, log_base=log_base), Scope({}, log_base=log_base))
    return _at_points(gold, answer, scopes, names, told.traits ^ said.traits, agree)


def _near(first: Number, second: Number) -> bool:
    if is_exact(first) and is_exact(second):
        return first == second
    first, second = real(first), real(second)
    largest = max(abs(first), abs(second))
    return bool(abs(first - second) <= context().ldexp(largest, -RELATIVE))


def constant(node: Node) -> Number | None:
    """The real value of a scalar without variables, or None."""
    if free_variables(node):
        return None
    try:
        value = evaluate(node, Scope({}))
    except Undefined:
        return None
    return value if is_exact(value) or isinstance(value, context().mpf) else None
