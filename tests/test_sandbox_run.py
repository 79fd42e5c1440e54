# ruff: noqa: E501 (programs keep their lines)
"""Running programs: exact output, prefixes kept and not, the memo, the asyncio form, what is counted."""

import asyncio
import os
import select
import subprocess
import sys
import time

import pytest
from sandbox_case import run, run_all, small
from test_sandbox_service import processes

from smallmath_jax.verify.sandbox import SandboxBusy, SandboxError, start_sandbox


@pytest.fixture(scope="module")
def sandbox():
    with start_sandbox(small()) as started:
        yield started


@pytest.fixture(scope="module")
def whole():
    """A sandbox that keeps no prefix: every program runs from its first line."""
    with start_sandbox(small(snapshots=0)) as started:
        yield started


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], capture_output=True, check=True
    )
    return done.stdout.decode()


@pytest.mark.parametrize(
    "code",
    [
        "print(0.1 + 0.2)\nprint(1 / 3, end='')",
        "print('  kept  \\n\\n')",
        "import sys\nsys.stdout.write('a\\r\\nb\\x00\\t\\u00e9\\u221e\\U0001f600')",
        "if __name__ == '__main__':\n    print('main')",
        "import sys\nprint(1, file=sys.stderr)\nprint(2)",
        "def f(x):\n    return f(x - 1) * x if x else 1\nprint(f(20))",
        "from __future__ import annotations\nx: nothing = 1\nprint(x)",
        "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\nprint(P(1), P.__module__)",
        "import pickle\nclass P: pass\nprint(type(pickle.loads(pickle.dumps(P()))))",
        "import numpy as np\nprint(np.linspace(0, 1, 7) @ np.eye(7))",
        "from fractions import Fraction as F\nprint(sum(F(1, n) for n in range(1, 30)))",
        "import scipy.constants\nprint(scipy.constants.golden)",
        "import encodings.idna, json.tool, concurrent.futures, wave\nprint('imported')",
        "print(*range(15000))",
        "",
    ],
)
def test_output_is_what_python_prints(sandbox, code):
    result = run(sandbox, code)
    assert (result.status, result.stdout) == ("ok", python(code)), result.stderr_tail


def test_bytes_that_are_not_text_are_shown(sandbox):
    assert run(sandbox, "import os; os.write(1, b'a\\xff\\n')").stdout == "a\\xff\n"


def test_errors_carry_the_programs_own_traceback(sandbox):
    result = run(sandbox, "def f():\n    return 1 / 0\nprint('before')\nf()")
    assert (result.status, result.stdout) == ("error", "before\n")
    lines = result.stderr_tail.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert [line.strip() for line in lines[1:3]] == [
        'File "<code>", line 4, in <module>', 'File "<code>", line 2, in f',
    ]  # fmt: skip
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "SyntaxError" in run(sandbox, "print(").stderr_tail
    assert run(sandbox, "x = '\x00'").status == "error"


def test_every_run_is_alike(sandbox):
    code = "import random, numpy as np\nprint(random.random(), np.random.rand(), hash('a'), list({'x', 'y', 'z'}))"
    first, second = run_all(sandbox, code, code)
    assert first.stdout == second.stdout


PREFIXES = {
    "names": ("x = [1]\ndef f(): return len(x)", "print(f()); x.append(2)"),
    "output": ("print('dropped')\nimport sys; print('too', file=sys.stderr)", "print('kept')"),
    "modules": ("import math\nmath.pi = 3\nmath.calls = []", "math.calls.append(1); print(math.pi, math.calls)"),
    "random": ("import random\nrandom.seed(3); random.random()", "print(random.random())"),
    "numpy": ("import numpy as np\na = np.zeros(3)", "a += 1; print(a)"),
    "sympy": ("import sympy as sp\nx = sp.Symbol('x')\nassumed = sp.Symbol('y', positive=True)", "print(sp.solve(x**2 - 2, x), sp.sqrt(assumed**2))"),
    "generator": ("g = iter(range(5))\nnext(g)", "print(next(g), list(g))"),
    "streams": ("import sys, io\nsys.stdout = io.StringIO()", "print(1); sys.__stdout__.write(sys.stdout.getvalue() + '!')"),
    "buffered": ("import sys\nsys.stdout.write('no newline')", "print(1)"),
    "future": ("from __future__ import annotations\nimport math", "x: unknown = 2\nprint(x)"),
    "no newline": ("x = 1", "print(x)"),
    "open block": ("for n in range(3):\n    m = n", "    print(m)\nelse:\n    print('end')"),
    "unfinished": ("total = (1 +", "2)\nprint(total)"),
    "broken code": ("x = 1", "print(x"),
    "broken prefix": ("x = = 1", "print(2)"),
    "failing": ("print('lost')\n1 / 0", "print(3)"),
    "leaving": ("print('lost')\nraise SystemExit", "print(3)"),
    "leaving at once": ("import os\nprint('lost', flush=True)\nos._exit(0)", "print(3)"),
    "leaving badly": ("import os\nos._exit(9)", "print(3)"),
    "cwd and mask": ("import os\nos.umask(0o77)\nos.chdir('/')", "print(os.getcwd(), oct(os.umask(0)))"),
    "hooks": ("import atexit\natexit.register(print, 'bye')", "print('hello')"),
    "signals": ("import signal\nsignal.signal(signal.SIGALRM, print)", "print(signal.getsignal(signal.SIGALRM) is print)"),
    "files": ("try:\n    open('/tmp/f', 'w').write('x')\nexcept OSError: pass", "import os; print(os.path.exists('/tmp/f') or not os.path.exists('/python')); os.path.exists('/tmp/f') and os.remove('/tmp/f')"),
    "scratch folder": ("import os\ntry: os.chmod('/tmp', 0o500)\nexcept OSError: pass", "import os; print(oct(os.stat('/tmp').st_mode) if os.path.exists('/python') else '')"),
    "timer": ("import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.3)", "import time; time.sleep(1); print('end')"),
    "forges a status": ("x = 1", "import os; os._exit(87)"),
    "memory": ("big = 'x' * (100 << 20)", "print(len(big + ''))"),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFIXES)
def test_a_kept_prefix_gives_what_a_whole_run_gives(sandbox, whole, name):
    prefix, code = PREFIXES[name]
    codes = [code, code + "\n", code + "\npass", code + "\n"]
    fresh = run_all(whole, *codes, prefix=prefix)
    kept = run_all(sandbox, *codes, prefix=prefix)
    seen = [[(r.status, r.stdout, r.stderr_tail) for r in results] for results in (fresh, kept)]
    assert seen[0] == seen[1]
    assert len({(r.status, r.stdout) for r in kept}) == 1
    assert not any(
        "dropped" in r.stdout or "lost" in r.stdout or "too" in r.stderr_tail for r in kept
    )


GROWTH = {
    "catches": ("try:\n    big = b'x' * (100 << 20)\nexcept MemoryError:\n    big = None", "print(big is None)"),
    "claims to be kept": ("import os\nbig = b'x' * (100 << 20)\nif os.write(21, b'kept'):\n    while True: pass", ""),
    "fits": ("big = b'x' * (25 << 20)", "print(len(big))"),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWTH)
def test_a_prefix_has_all_the_memory_of_a_program(name):
    """What has grown too large to be kept is not kept; it never sees a smaller limit."""
    prefix, code = GROWTH[name]
    settings = small(modules=(), cpu_seconds=5.0, memory_mb=150, snapshot_memory_mb=50)
    with start_sandbox(settings) as sandbox:
        at_rest = len(processes(sandbox._process.pid))
        results = run_all(sandbox, *(f"{code}\n# {n}" for n in range(3)), prefix=prefix)
        kept = len(processes(sandbox._process.pid)) - at_rest
    shown = {"catches": "False\n", "fits": f"{25 << 20}\n"}
    if name in shown:
        assert [(r.status, r.stdout) for r in results] == [("ok", shown[name])] * 3
    assert kept == (name == "fits")


def test_the_prefixs_cpu_time_counts(sandbox):
    prefix = (
        "import time\nuntil = time.process_time() + 0.25\nwhile time.process_time() < until: pass"
    )
    burn = "until = time.process_time() + 0.3\nwhile time.process_time() < until: pass"
    quick = run_all(sandbox, "print(1)", "print(2)", "print(3)", prefix=prefix)
    assert all(result.status == "ok" and result.cpu_ms > 200 for result in quick)
    slow = run_all(sandbox, burn, burn + "\n", prefix=prefix)
    assert {result.status for result in slow} == {"timeout_cpu"}


def test_a_prefix_is_executed_once_for_many_siblings():
    prefix = (
        "import time\nuntil = time.process_time() + 0.2\nwhile time.process_time() < until: pass"
    )
    with start_sandbox(small(modules=())) as sandbox:
        before = _cpu(sandbox)
        results = run_all(sandbox, *(f"print({n})" for n in range(20)), prefix=prefix)
        spent = _cpu(sandbox) - before
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(20)]
    assert spent < 20 * 0.2 / 3


def _cpu(sandbox) -> float:
    """CPU seconds of the sandbox's processes, those that have ended included."""
    parents, used = {}, {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry)] = int(fields[1])
        used[int(entry)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    family = {sandbox._process.pid}
    for _ in range(5):
        family |= {child for child, parent in parents.items() if parent in family}
    return sum(used[member] for member in family if member in used)


def test_the_same_program_runs_once():
    with start_sandbox(small(memo_entries=10, modules=())) as sandbox:
        first, second = run_all(
            sandbox, "import os; print(os.urandom(8))", "import os; print(os.urandom(8))"
        )
        third = run(sandbox, "import os; print(os.urandom(8))")
        other = run(sandbox, "print(os.urandom(8))", prefix="import os")
        assert first.stdout == second.stdout == third.stdout != other.stdout
        assert [first.cached, second.cached, third.cached, other.cached] == [
            False,
            True,
            True,
            False,
        ]
        for n in range(12):
            run(sandbox, f"print({n})")
        assert not run(sandbox, "print(0)").cached and run(sandbox, "print(11)").cached
        counts = sandbox.counters()
        assert (counts["executed"], counts["cached"], counts["ok"]) == (15, 3, 15)


def test_results_come_in_the_order_of_programs_and_by_ticket(sandbox):
    results = run_all(sandbox, *(f"print({n})" for n in range(30)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(30)]
    tickets = {sandbox.submit("", f"print({n}, 'ticket')"): n for n in range(20)}
    assert sandbox.in_flight == 20
    found = {}
    while len(found) < 20:
        assert select.select([sandbox], [], [], 30)[0], "submitted programs never ran"
        found.update(sandbox.poll())
    assert {tickets[ticket]: result.stdout for ticket, result in found.items()} == {
        n: f"{n} ticket\n" for n in range(20)
    }
    assert sandbox.poll(5.0) == [] and sandbox.in_flight == 0


def test_thousands_may_be_awaited_while_the_loop_goes_on(sandbox):
    async def drive():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        ticking = asyncio.create_task(tick())
        waiting = [sandbox.run("x = 1", f"print({n % 40} + x)") for n in range(40)]
        cancelled = asyncio.create_task(sandbox.run("", "print('nobody waits')"))
        await asyncio.sleep(0)
        cancelled.cancel()
        results = await asyncio.gather(*waiting)
        ticking.cancel()
        return ticks, results

    ticks, results = asyncio.run(drive())
    assert [result.stdout for result in results] == [f"{n + 1}\n" for n in range(40)]
    assert ticks > 1
    assert asyncio.run(sandbox.run("", "print('another loop')")).stdout == "another loop\n"
    assert run(sandbox, "print('and none')").stdout == "and none\n"


def test_too_much_in_flight_is_said_and_waited_for():
    with start_sandbox(small(pending=3, modules=())) as sandbox:
        for n in range(3):
            sandbox.submit("", f"print({n})")
        with pytest.raises(SandboxBusy, match="3 programs are in flight"):
            sandbox.submit("", "print(3)")

        async def many():
            return await asyncio.gather(*(sandbox.run("", f"print({n}, 'a')") for n in range(12)))

        assert [r.stdout for r in asyncio.run(many())] == [f"{n} a\n" for n in range(12)]
        assert len(sandbox.poll()) == 3
        assert len(run_all(sandbox, *(f"print({n}, 'b')" for n in range(10)))) == 10


@pytest.mark.parametrize("why", ["known", "cancelled", "rejected"])
def test_one_who_needs_no_room_after_all_leaves_it_to_the_next(why):
    async def many(sandbox):
        codes = {"known": "print(1)", "cancelled": "print(2)", "rejected": "print('\ud800')"}
        first = asyncio.create_task(sandbox.run("", "print(1)"))
        others = [asyncio.create_task(sandbox.run("", codes[why])) for _ in range(2)]
        last = asyncio.create_task(sandbox.run("", "print(3)"))
        if why == "cancelled":
            await first
            assert not any(other.done() for other in others)
            for other in others:
                other.cancel()
        results = await asyncio.wait_for(asyncio.gather(first, last), 30)
        await asyncio.gather(*others, return_exceptions=True)
        return [result.stdout for result in results]

    with start_sandbox(small(pending=1, modules=(), memo_entries=10)) as sandbox:
        assert asyncio.run(many(sandbox)) == ["1\n", "3\n"]


def test_waiting_in_the_queue_is_not_run_time():
    nap = "import time; time.sleep(0.3)  # {}"
    with start_sandbox(small(modules=())) as sandbox:  # its counters hold these programs alone
        results = run_all(sandbox, *(nap.format(n) for n in range(4)))
        counts = sandbox.counters()
    assert all(result.status == "ok" and result.wall_ms < 10_000 for result in results)
    assert counts["queue_ms_p99"] > 600


def test_what_cannot_be_a_program_is_rejected(sandbox):
    result = run(sandbox, "x = '" + "y" * (1 << 20) + "'")
    assert result.status == "rejected" and "1048576" in result.stderr_tail
    assert run(sandbox, "print('\ud800')").status == "rejected"


def test_it_says_when_it_is_closed():
    with start_sandbox(small(modules=())) as sandbox:
        pass
    with pytest.raises(SandboxError, match="closed"):
        run(sandbox, "print(1)")
    sandbox.close()


def test_programs_run_beside_each_other():
    with start_sandbox(small(workers=3, modules=())) as sandbox:
        start = time.monotonic()
        results = run_all(sandbox, *(f"import time; time.sleep(2)  # {n}" for n in range(3)))
        assert {result.status for result in results} == {"ok"}
        assert time.monotonic() - start < 5.5
