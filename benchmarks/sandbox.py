"""Programs per CPU-second: `python benchmarks/sandbox.py [--programs=200] [--workers=1] [--tier=T3]`.

CPU time is counted over everything: this process, the supervisor, the workers, their forkers and every program's own
process, ended ones included. It is the measure because it does not depend on who else uses the machine's cores (it
still does on caches: compare with the fresh process of the same minute). All programs are distinct, and the memo is
off.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

from smallmath_jax.verify.sandbox import Sandbox, SandboxSettings, start_sandbox

PREFIX = """
import sympy as sp
x, y = sp.symbols("x y")
f = sp.expand((x + y) ** 12)
roots = sp.solve(x**3 - 6 * x**2 + 11 * x - 6, x)
area = sp.integrate(x * sp.sin(x), (x, 0, sp.pi))
"""
KINDS = {
    "trivial": lambda n: ("", f"print({n} + 1)"),
    "small sympy": lambda n: (
        "",
        f"import sympy as sp\nx = sp.symbols('x')\nprint(sp.solve(x**2 - {2 * n + 3} * x + {n * (n + 3)}, x))",
    ),
    "linear sympy": lambda n: (
        "",
        f"from sympy import *\nx = symbols('x')\nprint(solve(3 * x - {n}, x), Rational({n}, 7) + sqrt({n}))",
    ),
    "loops": lambda n: (
        "",
        f"total = 0\nfor k in range(1000):\n    total += k % {n + 2}\nprint(total)",
    ),
    "siblings": lambda n: (PREFIX, f"print(roots, area, f.coeff(x, {n}), {n})"),
}
FRESH = {
    "trivial": "print(1 + 1)",
    "small sympy": "import sympy as sp\nx = sp.symbols('x')\nprint(sp.solve(x**2 - 9 * x + 18, x))",
}


def family_cpu(root: int) -> float:
    """CPU seconds of a process and its descendants, with those they have waited for."""
    parents, used = {}, {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry)] = int(fields[1])
        used[int(entry)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    family = {root}
    for _ in range(6):
        family |= {child for child, parent in parents.items() if parent in family}
    return sum(used.get(member, 0.0) for member in family)


def own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(
    sandbox: Sandbox, programs: list[tuple[str, str]]
) -> tuple[float, float, float, list[float]]:
    """CPU seconds of the sandbox and of this process, wall seconds, and each program's CPU milliseconds."""
    root = sandbox._process.pid
    before, own, start = family_cpu(root), own_cpu(), time.monotonic()
    results = sandbox.run_many(programs)
    wall = time.monotonic() - start
    own, spent = own_cpu() - own, family_cpu(root) - before
    bad = [result for result in results if result.status != "ok"]
    if bad:
        raise SystemExit(f"{len(bad)} programs failed, the first: {bad[0]}")
    return spent, own, wall, [result.cpu_ms for result in results]


def fresh(code: str, times: int) -> float:
    """CPU seconds of a fresh interpreter that runs the code: the least of several."""
    seconds = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


_BARE = """
import os, resource, sys, types
from smallmath_jax.verify.sandbox import programs
programs.warm(("sympy", "numpy", "scipy", "mpmath"))
sys.stdout = open(os.devnull, "w")
def cpu():
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
codes, before = eval(sys.argv[1]), cpu()
for code in codes:
    process = os.fork()
    if process == 0:
        exec(code, {"__name__": "__main__"})
        os._exit(0)
    os.waitpid(process, 0)
print((cpu() - before) / len(codes), file=sys.stderr)
"""


def bare_fork(codes: list[str]) -> float:
    """CPU seconds a program costs in a plain `os.fork` of an interpreter as warm, without isolation."""
    done = subprocess.run(
        [sys.executable, "-c", _BARE, repr(codes)], check=True, capture_output=True
    )
    return float(done.stderr.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tier", default="")
    options = parser.parse_args()
    settings = SandboxSettings(workers=options.workers, tier=options.tier, memo_entries=0)
    count = options.programs
    with start_sandbox(settings) as sandbox:
        print(
            f"{sandbox.tier}: {sandbox.isolation}; {options.workers} worker(s), {count} programs a row"
        )
        heads = (
            f"{'per CPU-second':>15}{'CPU ms':>9}{'client ms':>12}{'program ms':>12}{'wall s':>8}"
        )
        print(f"{'programs':<22}{heads}")
        rates = {}
        for name, make in KINDS.items():
            measure(sandbox, [make(count + n) for n in range(5)])
            spent, own, wall, each = measure(sandbox, [make(n) for n in range(count)])
            rates[name] = count / (spent + own)
            line = f"{rates[name]:>15.0f}{1000 / rates[name]:>9.2f}{1000 * own / count:>12.2f}"
            print(f"{name:<22}{line}{statistics.median(each):>12.2f}{wall:>8.1f}", flush=True)
        for name, code in FRESH.items():
            seconds = fresh(code, 3)
            line = f"{1 / seconds:>15.1f}{1000 * seconds:>9.0f}"
            print(f"{'fresh: ' + name:<22}{line}  the sandbox: {rates[name] * seconds:.0f} x")
    for name in FRESH:
        seconds = bare_fork([KINDS[name](n)[1] for n in range(count)])
        line = f"{1 / seconds:>15.0f}{1000 * seconds:>9.2f}"
        print(f"{'bare fork: ' + name:<22}{line}  the sandbox: {rates[name] * seconds:.2f} x")
    with start_sandbox(
        SandboxSettings(workers=options.workers, tier=options.tier, memo_entries=0, snapshots=0)
    ) as whole:
        few = max(count // 4, 1)
        spent, own, _, _ = measure(whole, [KINDS["siblings"](n) for n in range(few)])
        rate = few / (spent + own)
        line = f"{rate:>15.0f}{1000 / rate:>9.2f}"
        print(f"{'siblings, not kept':<22}{line}  keeping: {rates['siblings'] / rate:.1f} x")


if __name__ == "__main__":
    main()
