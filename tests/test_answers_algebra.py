"""Our comparison against sympy's algebra: what sympy rewrites stays equal, what it perturbs does not.

The gold and the answer are both printed by sympy (LaTeX and plain), so neither spelling is ours.
"""

import random

import pytest
import sympy

from smallmath_jax.verify.answers import compare

X, Y, N = sympy.symbols("x y n")


def random_polynomial(draw):
    return (
        sum(draw.randint(-9, 9) * X**a * Y**b for a in range(3) for b in range(2))
        + draw.randint(1, 9) * X**3
    )


def random_rational(draw):
    return (draw.randint(1, 9) * X + draw.randint(1, 9)) / (
        (X + draw.randint(1, 5)) * (X - draw.randint(1, 5))
    )


def random_number(draw):
    root = sympy.sqrt(draw.choice([2, 3, 5, 6, 7]))
    return (
        sympy.Rational(draw.randint(1, 20), draw.randint(1, 9))
        + root * draw.randint(1, 5)
        + draw.choice([0, sympy.pi, sympy.exp(1), sympy.log(2)])
    )


def random_function(draw):
    inner = draw.randint(1, 4) * X + draw.randint(0, 3)
    return draw.choice([sympy.sin, sympy.cos, sympy.exp])(inner) * (
        X + draw.randint(1, 5)
    ) + sympy.sqrt(X**2 + 1)


def rewritten(value):
    yield sympy.expand(value)
    yield sympy.factor(value)
    yield sympy.together(value)
    yield (
        sympy.apart(value, X)
        if value.is_rational_function(X) and value.free_symbols == {X}
        else value
    )
    yield sympy.expand(value * (X**2 + 1)) / (X**2 + 1)


KINDS = {
    "polynomial": random_polynomial,
    "rational": random_rational,
    "number": random_number,
    "function": random_function,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_sympy_rewrites_stays_equal(kind):
    draw = random.Random(kind)
    for _ in range(12):
        value = KINDS[kind](draw)
        gold = sympy.latex(value)
        for form in rewritten(value):
            assert compare(gold, sympy.latex(form)) == "correct", (gold, form)
            assert compare(gold, str(form)) == "correct", (gold, str(form))


@pytest.mark.parametrize("kind", KINDS)
def test_what_differs_by_any_term_is_wrong(kind):
    draw = random.Random(kind)
    for _ in range(12):
        value = KINDS[kind](draw)
        for other in (
            value + 1,
            -value,
            2 * value,
            value + sympy.Rational(1, 10**12),
            value * X,
            value + N,
        ):
            assert compare(sympy.latex(value), sympy.latex(other)) == "wrong", (value, other)


def test_equations_up_to_a_factor_and_a_change_of_sides():
    draw = random.Random(5)
    for _ in range(20):
        left, right = random_polynomial(draw), random_polynomial(draw)
        gold = f"{sympy.latex(left)} = {sympy.latex(right)}"
        factor = draw.choice([-3, -1, 2, sympy.Rational(1, 7)])
        moved = f"0 = {sympy.latex(sympy.expand(factor * (left - right)))}"
        assert compare(gold, moved) == "correct"
        assert compare(gold, f"{sympy.latex(right)} = {sympy.latex(left)}") == "correct"
        assert compare(gold, f"{sympy.latex(left)} = {sympy.latex(right + 1)}") == "wrong"
        assert compare(gold, f"{sympy.latex(left)} = {sympy.latex(-right)}") == "wrong"


def test_inequalities_turn_with_the_sign_of_the_factor():
    draw = random.Random(6)
    for _ in range(20):
        left = random_polynomial(draw)
        gold = f"{sympy.latex(left)} < 0"
        assert compare(gold, f"{sympy.latex(3 * left)} < 0") == "correct"
        assert compare(gold, f"{sympy.latex(sympy.expand(-left))} > 0") == "correct"
        assert compare(gold, f"{sympy.latex(sympy.expand(-left))} < 0") == "wrong"
        assert compare(gold, f"{sympy.latex(left)} \\le 0") == "wrong"


def test_numbers_against_fractions():
    draw = random.Random(7)
    for _ in range(200):
        value = sympy.Rational(draw.randint(-400, 400), draw.choice([1, 2, 3, 4, 5, 8, 16, 25, 7]))
        gold = f"{value.p}/{value.q}" if value.q > 1 else str(value.p)
        forms = [sympy.latex(value), f"\\frac{{{3 * value.p}}}{{{3 * value.q}}}"]
        if set(sympy.factorint(value.q)) <= {2, 5}:
            forms.append(format(float(value), ".10f"))
        for form in forms:
            assert compare(gold, form) == "correct", (gold, form)
        assert compare(gold, sympy.latex(value + sympy.Rational(1, 997))) == "wrong"


def test_complex_numbers_and_matrices():
    draw = random.Random(8)
    for _ in range(20):
        a, b, c, d = (draw.randint(-9, 9) for _ in range(4))
        product = sympy.expand((a + b * sympy.I) * (c + d * sympy.I))
        assert compare(sympy.latex(product), f"({a}+{b}i)({c}+{d}i)") == "correct"
        assert compare(sympy.latex(product + 1), f"({a}+{b}i)({c}+{d}i)") == "wrong"
        matrix = sympy.Matrix([[a, b], [c, d]]) / 7
        whole = sympy.latex(7 * matrix)
        assert compare(sympy.latex(matrix), f"\\frac{{1}}{{7}}{whole}") == "correct"
        assert compare(sympy.latex(matrix), sympy.latex(matrix + sympy.eye(2))) == "wrong"


def test_sets_unions_and_solutions():
    draw = random.Random(9)
    for _ in range(20):
        low, middle, high = sorted(draw.sample(range(-20, 20), 3))
        union = sympy.Union(sympy.Interval.open(low, middle), sympy.Interval.Lopen(middle, high))
        gold = sympy.latex(union)
        assert compare(gold, f"x \\in ({low},{middle})\\cup({middle},{high}]") == "correct"
        assert compare(gold, f"({low},{high}]\\setminus\\{{{middle}\\}}") == "correct"
        assert compare(gold, f"({low},{middle})\\cup({middle},{high})") == "wrong"
        roots = sympy.FiniteSet(low, middle, high)
        assert compare(sympy.latex(roots), f"{high}, {low} \\text{{ and }} {middle}") == "correct"
        assert compare(sympy.latex(roots), f"x={high}, x={low}, x={middle}") == "correct"
        assert compare(sympy.latex(roots), f"{high}, {low}, {middle + 1}") == "wrong"
