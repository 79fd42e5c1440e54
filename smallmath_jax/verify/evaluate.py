"""Values of expression trees at given points: exact fractions where possible, else 50-digit floats, all bounded.

Sizes are bounded before anything is computed: powers, factorials and binomials that would be large become floats with
huge exponents, and what even those cannot hold raises `Undecided`.
"""

import dataclasses
import functools
import hashlib
import math
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath
from mpmath.ctx_mp import MPContext

from smallmath_jax.verify.trees import Node

DIGITS = 50  # of inexact arithmetic
BITS = 20_000  # of an exact numerator or denominator
EXACT_FACTORIAL = 3_000
STEPS = 5_000  # nodes evaluated for one value
HUGE = 10**15  # largest argument of a factorial, largest exponent of a power

Number = Any  # int, Fraction, mpmath mpf or mpc

_local = threading.local()


class Undecided(ValueError):
    """A value that these bounds, or this arithmetic, cannot give."""


class TooLarge(Undecided):
    """A value or a computation beyond these bounds: no second opinion would fare better."""


class Undefined(ValueError):
    """No value at this point: division by zero, the logarithm of zero ..."""


@dataclasses.dataclass
class Scope:
    """Where an expression is evaluated, and what evaluation noticed on the way."""

    point: Mapping[str, Number]
    degree: bool = (
        False  # a degree sign outside trigonometry: True scales by pi / 180, False is a unit
    )
    percent: bool = True  # a percent sign scales by 1 / 100
    log_base: int = 0  # base of a bare \\log; 0: natural
    imaginary: bool = False  # i was written
    left_reals: bool = False  # a root or logarithm of a negative number was taken
    unknown: bool = False  # something stood for itself: inequality proves nothing
    steps: list[int] = dataclasses.field(default_factory=lambda: [0])  # nodes evaluated, shared
    largest: Number = 0  # largest addend: what cancellation is measured against


def context() -> MPContext:
    """This thread's own 50-digit context: mpmath's global one belongs to everybody."""
    if not hasattr(_local, "context"):
        _local.context = MPContext()
        _local.context.dps = DIGITS
    return _local.context


def evaluate(node: Node, scope: Scope) -> Number:
    """The value of a scalar node. Raises Undecided or Undefined."""
    scope.steps[0] += 1
    if scope.steps[0] > STEPS:
        raise TooLarge(f"more than {STEPS} steps")
    try:
        value = _EVALUATORS[node.kind](node, scope)
    except KeyError as error:
        raise Undecided(f"no value for {node.kind} {error}") from error
    except (Undecided, Undefined):
        raise
    except (ZeroDivisionError, ValueError) as error:  # ValueError: mpmath at a pole
        raise Undefined(str(error)) from error
    except (OverflowError, MemoryError) as error:
        raise TooLarge(str(error)) from error
    except (TypeError, mpmath.libmp.NoConvergence) as error:
        raise Undecided(str(error)) from error
    return value


def is_exact(value: Number) -> bool:
    return isinstance(value, (int, Fraction))


def real(value: Number) -> Number:
    """A float of this context, or the complex number itself."""
    if isinstance(value, Fraction):
        mp = context()
        return mp.mpf(value.numerator) / value.denominator
    if isinstance(value, int):
        return context().mpf(value)
    return value


def _bounded(value: Number) -> Number:
    """Exact values beyond 20,000 bits go on as floats."""
    if isinstance(value, Fraction):
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    else:
        bits = value.bit_length() if isinstance(value, int) else 0
    return real(value) if bits > BITS else value


def _add(node: Node, scope: Scope) -> Number:
    return add([evaluate(arg, scope) for arg in node.args], scope)


def add(values: list[Number], scope: Scope) -> Number:
    """A sum; where it is inexact, the largest addend is noted."""
    if all(is_exact(value) for value in values):
        return _bounded(sum(values))
    values = [real(value) for value in values]
    scope.largest = max([scope.largest, *(abs(value) for value in values)])
    return sum(values[1:], values[0])


def _multiply(node: Node, scope: Scope) -> Number:
    return functools.reduce(multiply, [evaluate(arg, scope) for arg in node.args])


def multiply(first: Number, second: Number) -> Number:
    if is_exact(first) and is_exact(second):
        return _bounded(first * second)
    if (is_exact(first) and first == 0) or (is_exact(second) and second == 0):
        return 0
    return real(first) * real(second)


def _divide(node: Node, scope: Scope) -> Number:
    top, bottom = evaluate(node.args[0], scope), evaluate(node.args[1], scope)
    if bottom == 0 or (not is_exact(bottom) and _vanishes(bottom, scope)):
        raise Undefined("division by zero")
    if is_exact(top) and is_exact(bottom):
        return _bounded(Fraction(top) / bottom)
    return real(top) / real(bottom)


def _vanishes(value: Number, scope: Scope) -> bool:
    """Whether an inexact value is what cancellation leaves of zero."""
    return abs(value) <= abs(scope.largest) * context().mpf(10) ** (15 - DIGITS)


def _power(node: Node, scope: Scope) -> Number:
    base, exponent = evaluate(node.args[0], scope), evaluate(node.args[1], scope)
    if node.args[0] == Node("const", (), "e"):
        _limit_exponent(exponent, 1)
        return context().exp(real(exponent))
    return power(base, exponent, scope)


def power(base: Number, exponent: Number, scope: Scope) -> Number:
    """base ** exponent; odd roots of negative numbers are real, even ones leave the reals."""
    if base == 0:
        if is_exact(exponent) and exponent > 0:
            return 0
        raise Undefined("zero to a power that is not positive")
    if not is_exact(exponent):
        return _inexact_power(base, exponent, scope)
    exponent = Fraction(exponent)
    if exponent.denominator == 1:
        return _whole_power(base, int(exponent))
    if is_exact(base) and exponent.denominator <= 64:
        root = _exact_root(Fraction(base), exponent.denominator)
        if root is not None:
            return _whole_power(root, exponent.numerator)
    negative = is_exact(base) or isinstance(base, context().mpf)
    if negative and base < 0:
        if exponent.denominator % 2:
            sign = -1 if exponent.numerator % 2 else 1
            return sign * _inexact_power(-base, exponent, scope)
        scope.left_reals = True
    return _inexact_power(base, exponent, scope)


def _whole_power(base: Number, exponent: int) -> Number:
    if is_exact(base):
        base = Fraction(base)
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) == 1 or bits * abs(exponent) <= BITS:
            return base**exponent if abs(base) != 1 else base ** (exponent % 2)
    _limit_exponent(exponent, 1)
    return real(base) ** exponent


def _limit_exponent(exponent: Number, factor: int) -> None:
    if abs(exponent) * factor > HUGE:
        raise TooLarge("an exponent beyond 10^15")


def _inexact_power(base: Number, exponent: Number, scope: Scope) -> Number:
    mp = context()
    _limit_exponent(exponent, 1)
    base, exponent = real(base), real(exponent)
    if isinstance(base, mp.mpf) and base < 0:
        scope.left_reals = True
    return mp.power(base, exponent)


def _exact_root(base: Fraction, index: int) -> Fraction | None:
    """The exact root of a fraction (real, for odd roots of negative ones), or None."""
    if base < 0:
        root = _exact_root(-base, index) if index % 2 else None
        return None if root is None else -root
    top, bottom = _whole_root(base.numerator, index), _whole_root(base.denominator, index)
    return None if top is None or bottom is None else Fraction(top, bottom)


def _whole_root(value: int, index: int) -> int | None:
    if index == 2:
        root = math.isqrt(value)
    elif value.bit_length() > 1_000:
        return None
    else:
        guess = int(round(math.exp(math.log(value) / index))) if value else 0
        root = next((r for r in (guess - 1, guess, guess + 1) if r >= 0 and r**index == value), -1)
        if root < 0:
            return None
    return root if root**index == value else None


def _variable(node: Node, scope: Scope) -> Number:
    return scope.point[node.value]


def _constant(node: Node, scope: Scope) -> Number:
    mp = context()
    if node.value == "i":
        scope.imaginary = True
        return mp.mpc(0, 1)
    return {"pi": +mp.pi, "e": +mp.e, "inf": mp.inf}[node.value]


def _percent(node: Node, scope: Scope) -> Number:
    value = evaluate(node.args[0], scope)
    return multiply(value, Fraction(1, 100)) if scope.percent else value


def _degree(node: Node, scope: Scope) -> Number:
    value = evaluate(node.args[0], scope)
    return multiply(value, context().pi / 180) if scope.degree else value


def _factorial(node: Node, scope: Scope) -> Number:
    value = evaluate(node.args[0], scope)
    if abs(real(value)) > HUGE:
        raise TooLarge("the factorial of a huge number")
    if not is_exact(value):
        return context().gamma(value + 1)
    whole = Fraction(value).denominator == 1
    if node.value == 2:
        if not whole or not 0 <= value <= EXACT_FACTORIAL:
            raise TooLarge("a double factorial out of bounds")
        return _bounded(math.prod(range(int(value), 0, -2)))
    if whole and value < 0:
        raise Undefined("the factorial of a negative number")
    if whole and value <= EXACT_FACTORIAL:
        return _bounded(math.factorial(int(value)))
    return context().gamma(real(value) + 1)


def _opaque(node: Node, scope: Scope) -> Number:
    """An unknown function: equal arguments give equal values, and different ones do not."""
    mp = context()
    told = ",".join(mp.nstr(real(evaluate(arg, scope)), 20) for arg in node.args)
    return _hashed(f"{node.value}({told})")


SERIES = 200  # terms of a sum that are added one by one


def _series(node: Node, scope: Scope) -> Number:
    """A short sum or product with whole bounds term by term; any other as an unknown function of its parts."""
    body, *bounds = node.args
    low, high = (evaluate(bound, scope) for bound in bounds)
    kind, index = node.value
    finite = all(is_exact(bound) and Fraction(bound).denominator == 1 for bound in (low, high))
    inner = lambda value: dataclasses.replace(scope, point={**scope.point, index: value})
    if finite and 0 <= high - low < SERIES:
        terms = [evaluate(body, inner(Fraction(k))) for k in range(int(low), int(high) + 1)]
        return add(terms, scope) if kind == "sum" else functools.reduce(multiply, terms)
    scope.unknown = True
    mp = context()
    probes = [evaluate(body, inner(Fraction(*probe))) for probe in ((2, 1), (5, 1), (13, 4))]
    told = ",".join(mp.nstr(real(value), 20) for value in (*probes, low, high))
    return _hashed(f"{kind}({told})")


def _hashed(text: str) -> Fraction:
    digest = hashlib.sha256(text.encode()).digest()
    return 1 + Fraction(int.from_bytes(digest[:4], "big"), 2**32)


def _call(node: Node, scope: Scope) -> Number:
    if node.value in _TRIGONOMETRY:
        inside = dataclasses.replace(scope, degree=True)
        value = evaluate(node.args[0], inside)
        scope.imaginary, scope.left_reals = inside.imaginary, inside.left_reals
        if abs(real(value)) > context().mpf(10) ** 40:
            raise TooLarge("the sine of a huge number")
        return _trigonometric(node.value, value, inside)
    values = [evaluate(arg, scope) for arg in node.args]
    return _FUNCTIONS[node.value](scope, *values)


def _trigonometric(name: str, value: Number, scope: Scope) -> Number:
    """Circular functions; values that cancellation left of 0 and their poles are told apart."""
    mp = context()
    if is_exact(value) and value == 0 and name in ("sin", "tan"):
        return 0
    result = getattr(mp, name if name in ("sin", "cos", "tan") else _RECIPROCAL.get(name, name))(
        real(value)
    )
    tiny = mp.mpf(10) ** (12 - DIGITS) * (1 + abs(real(value)))
    if name in ("sin", "cos", "tan") and abs(result) < tiny:
        return 0
    if name in _RECIPROCAL:
        if abs(result) < tiny:
            raise Undefined(f"{name} at a pole")
        return 1 / result
    if abs(result) > 1 / tiny:
        raise Undefined(f"{name} at a pole")
    return result


def _logarithm(scope: Scope, value: Number, base: Number | None = None) -> Number:
    if base is None and scope.log_base:
        base = scope.log_base
    if base is not None:
        if base == 1:
            raise Undefined("a logarithm to base 1")
        exact = _exact_logarithm(value, base)
        return exact if exact is not None else _natural(scope, value) / _natural(scope, base)
    return _natural(scope, value)


def _exact_logarithm(value: Number, base: Number) -> int | None:
    """log_2 8 = 3 exactly, so that it may stand in an exponent."""
    if not (is_exact(value) and is_exact(base)) or value <= 0 or base <= 1:
        return None
    logs = [
        math.log(x.numerator) - math.log(x.denominator) for x in (Fraction(value), Fraction(base))
    ]
    guess = round(logs[0] / logs[1]) if logs[1] else 0
    if abs(guess) > 4_000 or Fraction(base) ** guess != value:
        return None
    return guess


def _natural(scope: Scope, value: Number) -> Number:
    if value == 0:
        raise Undefined("the logarithm of zero")
    if value == 1:
        return 0
    value = real(value)
    if isinstance(value, context().mpf) and value < 0:
        scope.left_reals = True
    return context().log(value)


def _root(scope: Scope, value: Number, index: Number) -> Number:
    if index == 0:
        raise Undefined("a zeroth root")
    if is_exact(index):
        return power(value, Fraction(1) / Fraction(index), scope)
    return power(value, 1 / real(index), scope)


def _binomial(scope: Scope, top: Number, bottom: Number) -> Number:
    if not (is_exact(top) and is_exact(bottom)):
        raise Undecided("a binomial coefficient of inexact numbers")
    if max(abs(top), abs(bottom)) > HUGE:
        raise TooLarge("a binomial coefficient of huge numbers")
    whole = Fraction(top).denominator == Fraction(bottom).denominator == 1
    if whole and 0 <= top and min(bottom, top - bottom) <= EXACT_FACTORIAL and top <= 10**6:
        if not 0 <= bottom <= top:
            return 0
        if min(bottom, top - bottom) * int(top).bit_length() <= 4 * BITS:
            return _bounded(math.comb(int(top), int(bottom)))
    return context().binomial(real(top), real(bottom))


def _rounder(function: Callable[[Number], int]) -> Callable[..., Number]:
    def rounded(scope: Scope, value: Number) -> Number:
        if is_exact(value):
            return function(value)
        if not isinstance(value, context().mpf):
            raise Undefined("rounding a complex number")
        if abs(value) > context().mpf(10) ** 30:
            raise TooLarge("rounding a huge number")
        near = context().nint(value)
        close = abs(value - near) < context().mpf(10) ** (20 - DIGITS) * (1 + abs(value))
        return int(near) if close else function(Fraction(str(context().nstr(value, 45))))

    return rounded


def _whole(function: Callable[..., int]) -> Callable[..., Number]:
    def applied(scope: Scope, *values: Number) -> Number:
        if not all(is_exact(value) for value in values):
            raise Undecided("an integer function of inexact numbers")
        return function(
            *(int(value) if Fraction(value).denominator == 1 else value for value in values)
        )

    return applied


def _extreme(function: Callable[..., Number]) -> Callable[..., Number]:
    def applied(scope: Scope, *values: Number) -> Number:
        return function(values, key=real) if len(values) > 1 else values[0]

    return applied


def _exponential(scope: Scope, value: Number) -> Number:
    _limit_exponent(value, 1)
    return context().exp(real(value))


def _mp(name: str) -> Callable[..., Number]:
    def applied(scope: Scope, value: Number) -> Number:
        if name in ("sinh", "cosh", "tanh"):
            _limit_exponent(value, 1)
        result = getattr(context(), name)(real(value))
        if isinstance(result, context().mpc) and not isinstance(value, context().mpc):
            scope.left_reals = True
        return result

    return applied


_RECIPROCAL = {"cot": "tan", "sec": "cos", "csc": "sin"}
_TRIGONOMETRY = {"sin", "cos", "tan", *_RECIPROCAL}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "ln": lambda scope, value: _natural(scope, value),
    "log": _logarithm,
    "lg": lambda scope, value: _logarithm(scope, value, 10),
    "exp": _exponential,
    "root": _root,
    "cbrt": lambda scope, value: _root(scope, value, 3),
    "abs": lambda scope, value: abs(value),
    "floor": _rounder(math.floor),
    "ceil": _rounder(math.ceil),
    "binom": _binomial,
    "gcd": _whole(math.gcd),
    "lcm": _whole(math.lcm),
    "max": _extreme(max),
    "min": _extreme(min),
    "arcsin": _mp("asin"), "arccos": _mp("acos"), "arctan": _mp("atan"), "arccot": _mp("acot"),
    "arcsec": _mp("asec"), "arccsc": _mp("acsc"), "sinh": _mp("sinh"), "cosh": _mp("cosh"), "tanh": _mp("tanh"),
    "coth": _mp("coth"), "sech": _mp("sech"), "csch": _mp("csch"), "arcsinh": _mp("asinh"),
    "arccosh": _mp("acosh"), "arctanh": _mp("atanh"), "Re": lambda scope, value: context().re(real(value)),
    "Im": lambda scope, value: context().im(real(value)),
}  # fmt: skip
_EVALUATORS: dict[str, Callable[[Node, Scope], Number]] = {
    "num": lambda node, scope: node.value,
    "dec": lambda node, scope: node.value[0],
    "var": _variable,
    "const": _constant,
    "add": _add,
    "neg": lambda node, scope: -evaluate(node.args[0], scope),
    "mul": _multiply,
    "div": _divide,
    "pow": _power,
    "call": _call,
    "opaque": _opaque,
    "series": _series,
    "fact": _factorial,
    "pct": _percent,
    "deg": _degree,
}
