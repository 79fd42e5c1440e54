"""Model text is hostile text: nothing is executed, accepted or crashed by it, and nothing takes long."""

import builtins
import os
import subprocess
import time

import pytest

from smallmath_jax.verify.answers import compare

HUGE = [
    "9**9**9", "9^9^9", "10^(10^10)", "10^{10^{10^{10}}}", "(((9^9)^9)^9)^9", "2^{2^{2^{2^{2^{2}}}}}", "100000!",
    "10000000!", "5!!!!!!!", "((((5!)!)!)!)!", "9999!^{9999!}", r"\binom{10^9}{5\cdot 10^8}", r"\binom{10^{18}}{3}",
    r"\sum_{k=1}^{10^9} k", r"\sum_{i=1}^{150}\sum_{j=1}^{150}\sum_{k=1}^{150} ijk",
    r"\sum_{i=1}^{150}\sum_{j=1}^{150} 2^{ij}", "e^{e^{e^{e^{e^{e}}}}}", r"\sin(10^{10^{9}})", "(x+1)^{1000000}",
    "x^{x^{x^{x^{x^{x}}}}}", "x!^{x!^{x!}}", "(1+10^{-9})^{10^{15}}", "10^{1000000}", "1e999999", "1e9999999999",
    r"\lfloor 10^{10^{5}} \rfloor", r"\cosh(10^{10})", r"\infty-\infty", r"\frac{\infty}{\infty}", r"\frac{1}{0}",
    "0^0", "0^{-1}", r"\log_1 5", r"\sqrt[0]{5}", r"\tan\frac{\pi}{2}",
]  # fmt: skip
DEEP = [
    "(" * 100_000 + "5" + ")" * 100_000, "(" * 900 + "5" + ")" * 900, "{" * 1_900, r"\frac{1}{" * 200 + "1" + "}" * 200,
    r"\sqrt{" * 250 + "2" + "}" * 250, r"\sqrt" * 300 + "2", "-" * 1_900 + "5", "+".join(["x"] * 900),
    "*".join(["x"] * 900), "^".join(["2"] * 900), r"\sin" * 400 + "x", "|" * 1_900, "5" + "!" * 1_900,
    "5" + "%" * 1_900, "x" + "'" * 1_900, r"\begin{pmatrix}" + "1&" * 900 + r"\end{pmatrix}",
    r"\begin{pmatrix}" * 60 + "1" + r"\end{pmatrix}" * 60, r"\left(" * 250 + r"\right)" * 250,
    r"\text{" * 300 + "}" * 300,
    r"\{" + ",".join(map(str, range(400))) + r"\}", r"[0,1]\cup" * 150 + "[0,1]", "x<" * 600 + "1", "x=" * 600 + "5",
    r"\pm" * 300 + "1", r"1\pm1\pm1\pm1\pm1\pm1\pm1\pm1", "1:" * 500 + "2", r"\overline{" * 150 + "5" + "}" * 150,
]  # fmt: skip
LONG = [
    "a" * 1_999, "a" * 10**6, " " * 10**6, "\\" * 1_999, "$" * 1_999, ",." * 900, "1," * 900, "1,111" * 300,
    "0" * 1_999,
    "9" * 1_999, "0." + "3" * 1_900, "1" + " " * 1_900 + "1", r"0.\overline{" + "3" * 1_500 + "}", "." * 1_999,
    "A" * 26, "%s" * 900, r"\frac" * 350, r"\mathrm{d}" * 190,
]  # fmt: skip
CODE = [
    "__import__('os').system('touch CANARY')", "eval('5')", "exec('open(\"CANARY\",\"w\")')",
    r"\text{__import__('os').system('touch CANARY')}", "open('CANARY','w').write('5')", "(lambda: 5)()",
    "().__class__.__bases__[0].__subclasses__()", "$(touch CANARY)", "`touch CANARY`", "{{5}}{{7*7}}", "%n%n%n",
    "5\x00", "\x1b[2J5", "5\u202e", "\x00" * 500, "5;import os", "sympify('5')", "Symbol('x')", "Integer(5)+0*print()",
]  # fmt: skip
GOLDS = ("5", "(1,2)", "x^2+1", r"\{1,2\}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}")


@pytest.mark.parametrize("texts", [HUGE, DEEP, LONG, CODE], ids=["huge", "deep", "long", "code"])
def test_nothing_hostile_is_accepted_or_slow(texts):
    times = []
    for gold in GOLDS:
        for text in texts:
            start = time.process_time()
            verdict = compare(gold, text)
            times.append(time.process_time() - start)
            if (gold, text) not in (("5", "(" * 20 + "5" + ")" * 20),):
                assert verdict in ("wrong", "undecided"), (gold, text[:60], verdict)
    times.sort()
    assert times[-1] < 1.0 and times[len(times) * 9 // 10] < 0.05


def test_hostile_golds_crash_nothing_either():
    for text in (*HUGE, *DEEP, *LONG, *CODE):
        assert compare(text, "7") in ("wrong", "undecided", "unparsable_gold")


def test_comparing_runs_no_code(monkeypatch, tmp_path):
    """No builtin that could run model text is reached, and no file or process comes of it."""

    def caught(name):
        def call(*args, **kwargs):
            raise AssertionError(f"{name} was reached with {args[:1]}")

        return call

    for text in CODE:  # imports and caches are warm now
        compare("5", text)
    monkeypatch.chdir(tmp_path)
    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(builtins, name, caught(name))
    monkeypatch.setattr(os, "system", caught("os.system"))
    monkeypatch.setattr(subprocess, "Popen", caught("Popen"))
    for text in CODE:
        for gold in GOLDS:
            assert compare(gold + " ", text + " ") != "correct"
    assert list(tmp_path.iterdir()) == []


def test_text_that_means_five_in_a_strange_way_is_no_accident():
    """What the bounds let through is still judged by its value."""
    assert compare("5", "(" * 20 + "5" + ")" * 20) == "correct"
    assert compare("5", "+5") == "correct"
    assert compare(str(10**40), "10^{40}") == "correct"
    assert compare(str(10**40 + 1), "10^{40}") == "wrong"
