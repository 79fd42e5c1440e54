# ruff: noqa: E501 (programs keep their lines)
"""Two forkers serve programs: a light one with the standard library, a warm one. No result tells which it was."""

import random

import numpy as np
import pytest
from sandbox_case import run, run_all, small

from smallmath_jax.verify.sandbox import programs, rehearsal, start_sandbox

WARM = "\n# sympy"  # the word sends a program to the warm forker
LOADED = "import sys\nprint('sym' + 'py' in getattr(sys, 'mod' + 'ules'))\n"
HIDDEN = "load = __import__\nsp = load('sym' + 'py')\n"


@pytest.fixture(scope="module")
def sandbox():
    with start_sandbox(small()) as started:
        yield started


def seen(result):
    return result.status, result.stdout, result.stderr_tail


def test_a_program_is_sent_by_what_it_mentions(sandbox):
    assert run(sandbox, LOADED).stdout == "False\n"
    assert run(sandbox, LOADED + WARM).stdout == "True\n"
    assert run(sandbox, LOADED, prefix="# numpy").stdout == "True\n"
    assert [r.stdout for r in run_all(sandbox, LOADED, LOADED + "pass", prefix="x = 1")] == [
        "False\n"
    ] * 2


def test_a_kept_prefix_serves_siblings_of_one_kind(sandbox):
    codes = [LOADED, LOADED + WARM, LOADED + "pass", LOADED + WARM + "!"]
    seen = [result.stdout for result in run_all(sandbox, *codes, prefix="x = 2")]
    assert seen == ["False\n", "True\n", "False\n", "True\n"]


@pytest.mark.parametrize(
    "code",
    [
        "print(0.1 + 0.2, 2**200, 1 / 3)",
        "import random\nprint(random.random(), random.sample(range(99), 5))",
        "print(hash('a'), list({'x', 'y', 'z'}), {'b', 'a'})",
        "from fractions import Fraction\nfrom decimal import *\nprint(Fraction(1, 3) + 1, Decimal(1) / 3, getcontext())",
        "import statistics, itertools, math\nprint(statistics.stdev([1, 2, 4]), *itertools.permutations('abc'), math.comb(9, 4))",
        "import os, sys\nprint(sorted(os.environ.items()), os.getcwd(), sys.argv, sys.path, sys.getrecursionlimit(), sys.flags)",
        "import os\nprint(os.listdir('.') if os.path.exists('/python') else '', os.umask(0), os.getuid(), os.get_blocking(1))",
        "import warnings\nwarnings.warn('careful')\nimport re\nprint(re.findall(r'\\d+', 'a1b22'))",
        "import signal\nprint([signal.getsignal(n) for n in range(1, 32)])",
        # Not those that the worker sets from outside while the program starts (watch.set_limits)
        "import resource as r\nprint([r.getrlimit(n) for n in range(16) if n not in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_NPROC)])",
        "import time, calendar, datetime\nprint(time.tzname, calendar.day_name[0], datetime.date(2026, 1, 1))",
        "import asyncio, typing, enum, abc, inspect, textwrap, ast\nprint(ast.unparse(ast.parse('1+1')))",
        "def f(n): return f(n + 1)\nf(0)",
        "x = [1, 2\nprint(x)",
        "print(undefined_name)",
        "import no_such_package",
        "raise SystemExit(88)",
        "import os\nprint('kept', flush=True)\nos._exit(88)",
        "class A:\n    def __del__(self): print('never')\na = A()\nprint(1)",
        "",
    ],
)
def test_light_and_warm_agree(sandbox, code):
    light, warm = run_all(sandbox, code, code + WARM)
    assert seen(light) == seen(warm)
    light, warm = (run_all(sandbox, code, prefix=p)[0] for p in ("y = 1", "y = 1" + WARM))
    assert seen(light) == seen(warm)


@pytest.mark.parametrize("siblings", [1, 3])
def test_an_import_that_was_not_foreseen_is_met(sandbox, siblings):
    """The program starts again in the warm forker: nothing of the first attempt is seen."""
    code = """
import os
if os.path.exists("/python"):
    print(os.listdir("/tmp"))
    os.mkdir("/tmp/left")
print("once", flush=True)
try:
    sp = __import__("num" + "py"), __import__("sym" + "py")
except BaseException as error:
    print("caught", error)
print(sp[1].sqrt(8), sp[0].random.rand())
"""
    known = run(sandbox, code + WARM)
    assert known.status == "ok" and known.stdout.count("once") == 1
    for prefix, more in (("y = 1", code), (HIDDEN, code + "print(sp[1].E)")):
        results = run_all(sandbox, *(more + f"# {n}" for n in range(siblings)), prefix=prefix)
        assert all(r.status == "ok" and r.stdout.startswith(known.stdout) for r in results)
    assert run(sandbox, "import ｓympy; print(ｓympy.Integer(3))").stdout == "3\n"


def test_asking_for_more_gains_nothing(sandbox):
    """The exit status that asks for a second run is anybody's to give; it only ever buys one fresh run."""
    burn = "import time, os\nuntil = time.process_time() + {}\nwhile time.process_time() < until: pass\nos._exit(88)"
    result = run(sandbox, burn.format(0.2))
    assert (result.status, result.stdout) == ("error", "") and 150 < result.cpu_ms < 350
    assert run(sandbox, burn.format(9)).status == "timeout_cpu"
    write = "import os\nos.write(1, b'forged'); os.write(2, b'forged')\nif 'sym' + 'py' not in getattr(__import__('sys'), 'mod' + 'ules'): os._exit(88)\nprint('!')"
    result = run(sandbox, write)
    assert (result.status, result.stdout, result.stderr_tail) == ("ok", "forged!\n", "forged")
    for prefix in ("import os\nos._exit(88)", "raise SystemExit(88)"):
        results = run_all(sandbox, "print(1)", "print(2)", "print(3)", prefix=prefix)
        assert {(r.status, r.stdout) for r in results} == {("error", "")}
    assert run(sandbox, "print(6 * 7)").stdout == "42\n"


def test_every_forker_starts_from_the_same_seeds():
    """Those of sympy's own generator too, which workers would otherwise have from the system."""
    import sympy

    draw = lambda: (sympy.randprime(10**8, 10**9), random.random(), np.random.rand())
    programs._seed()
    first = draw()
    programs._seed()
    assert draw() == first


def test_where_there_is_one_forker_no_status_asks_for_another():
    with start_sandbox(small(modules=())) as sandbox:
        codes = ("import sys\nsys.exit(88)", "import os\nos._exit(88)")
        results = run_all(sandbox, *codes) + run_all(sandbox, *codes, prefix="x = 1")
        assert {(result.status, result.stderr_tail) for result in results} == {("error", "")}


def test_the_finder_may_be_taken_away(sandbox):
    """Then the import runs from the files: slow, and only this program's own affair."""
    code = (
        "import sys\nsys.meta_path[:] = sys.meta_path[1:]\nprint(__import__('mp' + 'math').mpf(2))"
    )
    assert run(sandbox, code).status in ("ok", "timeout_cpu", "out_of_memory")
    assert run(sandbox, "print(6 * 7)").stdout == "42\n"
    assert run(sandbox, HIDDEN + "print(sp.sqrt(4))").stdout == "2\n"


@pytest.mark.parametrize("mark", ["", WARM], ids=["light", "warm"])
def test_memory_means_the_same_in_both(sandbox, mark):
    """150 MB on top of the interpreter's own, whichever it is."""
    assert run(sandbox, "a = bytearray(120 << 20)" + mark).status == "ok"
    assert run(sandbox, "a = bytearray(160 << 20)" + mark).status == "out_of_memory"
    prefix = "a = bytearray(100 << 20)"
    codes = ["b = bytearray(20 << 20)" + mark, "b = bytearray(60 << 20)" + mark]
    assert [r.status for r in run_all(sandbox, *codes, prefix=prefix)] == ["ok", "out_of_memory"]


@pytest.mark.parametrize("mark", ["", WARM], ids=["light", "warm"])
def test_nothing_stays_in_either_forker(sandbox, mark):
    stain = """
import builtins, math, sys, os, random, decimal, string, json
for place in (builtins, math, sys, os, random, string, json):
    place.leaked = place
math.sqrt = builtins.len = json.dumps = None
sys.meta_path.clear(); sys.path.clear(); sys.path_hooks.clear()
random.seed(5); decimal.getcontext().prec = 3; sys.setrecursionlimit(77); os.environ["LEAKED"] = "1"
"""
    look = """
import builtins, math, sys, os, random, decimal, string, json
print([hasattr(place, "leaked") for place in (builtins, math, sys, os, random, string, json)], "LEAKED" in os.environ)
print(math.sqrt(4), len("ab"), json.dumps([1]), sys.path, random.random(), decimal.getcontext().prec, sys.getrecursionlimit())
"""
    before, stained, after = (run(sandbox, code + mark) for code in (look, stain, look))
    assert stained.status == before.status == "ok" and before.stdout == after.stdout
    assert before.stdout.startswith(f"{[False] * 7} False\n2.0 2 [1] ")


@pytest.mark.parametrize("mark", ["", WARM], ids=["light", "warm"])
def test_neither_forker_lets_a_program_fork(sandbox, mark):
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert run(sandbox, bomb + mark).status == "killed"
    assert run(sandbox, "print(6 * 7)" + mark).stdout == "42\n"


@pytest.mark.parametrize("k", [2, 45])
def test_the_rehearsals_run(sandbox, k):
    """A line that raises would leave the rest of its text cold."""
    for text in (rehearsal.PLAIN, rehearsal.SYMBOLIC):
        result = run(sandbox, f"k = {k}\n{text}")
        assert result.status == "ok", result.stderr_tail


def test_memory_that_is_freed_can_be_used_again(sandbox):
    """Small objects, which lie in arenas, and blocks of every size: far more in all than the limit of 150 MB."""
    small = (
        "for n in range(6):\n    a = [bytes(400) for _ in range(100_000)]\n    del a\nprint('done')"
    )
    large = "for n in range(100):\n    a = bytearray(1 << 12 + n % 14)\n    b = bytearray(n << 15)\nprint('done')"
    for code in (small, large):
        light, warm = run_all(sandbox, code, code + WARM)
        assert seen(light) == seen(warm) == ("ok", "done\n", "")


def test_packing_and_warming_change_no_result(sandbox):
    """The warm forker's code is copied and its caches are full: a fresh interpreter prints the same."""
    from test_sandbox_run import python

    codes = [
        "from sympy import *\nx, y = symbols('x y')\nprint(solve(x**3 - x - 1, x), factor(x**6 - 1), integrate(exp(-x**2), (x, -oo, oo)))\nn = symbols('n', integer=True)\nprint(latex(Integral(sqrt(x), x)), srepr(Rational(1, 3) * x), summation(n**2, (n, 1, 20)), nsolve(cos(n) - n, 1), series(exp(n), n, 0, 4))",
        "import inspect, sympy, numpy as np, mpmath\nprint(inspect.signature(sympy.solve), sympy.solve.__name__, len(inspect.getsource(sympy.factor)), sympy.gcd.__doc__[:60])\nprint(np.roots([1, -6, 11, -6]).round(6), mpmath.mp.dps, mpmath.zeta(3), np.random.RandomState(1).rand(2))",
    ]  # fmt: skip
    for code in codes:
        result = run(sandbox, code)
        assert (result.status, result.stdout) == ("ok", python(code)), result.stderr_tail
