"""What a forker runs before it serves, so that what programs use is imported, cached, specialised, and together.

Both texts stand for what models write, and want a whole number `k` to be set.
"""

PLAIN = r"""
import math, fractions, itertools, collections, statistics, decimal, re, functools, json, random, string
from math import gcd, sqrt, factorial, comb, pi
from fractions import Fraction
from itertools import combinations, permutations, product
def step(n, d=2):
    return n // d if n % d == 0 else 3 * n + 1
class Point:
    def __init__(self, x):
        self.x = x
    def __repr__(self):
        return f"Point({self.x})"
total, seen = 0, {}
for n in range(1, 60):
    total += step(n); seen[n] = [n * 2, str(n)]
    if n % 7 == 0:
        continue
while total > 10:
    total -= 99
print(total, len(seen), f"{math.pi:.3f}", sqrt(k) * 2, factorial(9), comb(9, 2), Fraction(1, k) + 1, sep=" ")
print(sum(x * x for x in range(20)), [x for x in combinations("abc", 2)], sorted({3, 1, 2}), max(seen), Point(1))
print(list(map(int, "1 2 3".split())), abs(-2) ** 0.5, round(2.567, 2), divmod(7, 3), pow(3, 20, 7), 10**30)
print(any(x > 3 for x in (1, 5)), all([1]), "a,b".replace(",", ";").upper(), tuple(zip([1], [2])))
statistics.mean([1, 2]); decimal.Decimal("1.1") * 2; collections.Counter("aab").most_common(1)
functools.reduce(gcd, [12, 18]); collections.defaultdict(list)[1].append(2); re.findall(r"\d+", "a12")
for i, word in enumerate(["a", "b"]):
    isinstance(word, str) and float("1.5")
try:
    1 / 0
except ZeroDivisionError as error:
    print(error)
"""

SYMBOLIC = r"""
from sympy import *
import sympy as sp, numpy as np, math, fractions, itertools, collections, statistics, mpmath
x, y, n = sp.symbols("x y n")
a, b, c = sp.symbols("a b c", positive=True)
print(sp.solve(x**2 - (2 * k + 1) * x + k * (k + 1), x), sp.solve(x**2 - k * x - 1, x), solve(Eq(2 * x + k, 11), x))
print(solve(3 * x - k, x), Rational(k, 7) + sqrt(k))
print(sp.solve([x + y - 3 * k, x - y - 1], [x, y]), sp.solve(x**3 - 2 * k, x), solve([x + y - k, x * y - 6], [x, y]))
print(sp.simplify((x**2 - k**2) / (x - k)), sp.factor(x**4 - k**4), sp.expand((x + k * y) ** 3))
print(sp.integrate(sp.sin(k * x) * x, x), sp.diff(sp.exp(k * x**2), x), sp.limit(sp.sin(k * x) / x, x, 0))
print(sp.latex(sp.sqrt(2) / 3 + k), sp.N(sp.pi * k, 20), sp.Rational(1, 3) + sp.sqrt(8 * k), sp.nsimplify("0.5"))
print(sp.factorint(360 * k), sp.isprime(97), sp.Matrix([[1, 2], [3, k + 9]]).inv(), sp.summation(n + k, (n, 1, 10)))
print(sp.solveset(x**2 - 4 * k, x, sp.S.Reals), sp.binomial(10, 3), sp.gcd(12, 18), sp.sympify(f"x**2 + {k}"))
print(sp.trigsimp(sp.sin(x) ** 2 + k * sp.cos(x) ** 2), sp.series(sp.cos(k * x), x, 0, 4), sp.apart(k / (x**2 - 1)))
print((x**2 + k * x).subs(x, 3), sp.Poly(x**2 + k, x).all_coeffs(), (a * b / c).subs(a, k), sp.floor(k / sp.Integer(2)))
print(float(sp.sqrt(k)), int(sp.Integer(k)), sp.Abs(-k), sp.log(8 * k).evalf(), sp.cos(sp.pi / 3), sp.Eq(x, k))
print(sp.Sum(n, (n, 1, k)).doit(), np.linalg.solve(np.eye(3) * 2.0, np.arange(3.0)), np.roots([1, -3, 2]))
print(mpmath.mpf(1) / 3, fractions.Fraction(3, 9), statistics.mean([1, 2]), list(itertools.permutations("abc")))
"""
