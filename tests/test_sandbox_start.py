"""The sandbox may start after jax: what a client has loaded, opened, set, ignored or blocked does not reach it."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CLIENT = f"""
    import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
    import json, os, pathlib, signal
    import jax, jax.numpy as jnp
    jnp.ones(3).sum().block_until_ready()
    read, write = os.pipe()
    os.set_inheritable(write, True)
    for number in (signal.SIGCHLD, signal.SIGPROF, signal.SIGXCPU, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGXCPU, signal.SIGTERM, signal.SIGCHLD}})
    from sandbox_case import run_all, small
    from test_sandbox_service import processes
    from smallmath_jax.verify.sandbox import start_sandbox

    def look(process):
        folder = pathlib.Path(f"/proc/{{process}}")
        status = dict(l.split(":", 1) for l in (folder / "status").read_text().splitlines())
        found = map(str, (folder / "fd").iterdir())
        links = [os.readlink(entry) for entry in found if os.path.lexists(entry)]
        return {{
            "threads": int(status["Threads"]),
            "blocked": int(status["SigBlk"], 16),
            "ignored": int(status["SigIgn"], 16),
            "environment": sorted(
                line.partition("=")[0]
                for line in (folder / "environ").read_text().split("\\0") if line
            ),
            "pipe": os.readlink(f"/proc/self/fd/{{write}}") in links,
            "libraries": [w for w in ("jaxlib", "xla", "libtpu") if w in (folder / "maps").read_text()],
        }}

    with start_sandbox(small(modules=(), tier=sys.argv[1])) as sandbox:
        family = [sandbox._process.pid, *processes(sandbox._process.pid)]
        codes = ("print(1)", "while True: pass", "1 / 0", "import ctypes; ctypes.string_at(0)")
        told = {{
            "mine": look(os.getpid()),
            "theirs": [look(process) for process in family],
            "verdicts": [result.status for result in run_all(sandbox, *codes)],
        }}
    print(json.dumps(told))
"""
SET = {
    "GOLD_ANSWER": "42",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true",
    "LIBTPU_INIT_ARGS": "--x=1",
    "PYTHONSTARTUP": "/nowhere",
    "LD_PRELOAD": "libutil.so.1",
    "JAX_PLATFORMS": "cpu",
}
ALLOWED = {"PYTHONHASHSEED", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
ALLOWED |= {"LANG", "PATH", "LD_LIBRARY_PATH", "LD_BIND_NOW", "LC_CTYPE"}
PYTHONS_OWN = 1 << 12 | 1 << 24  # SIGPIPE and SIGXFSZ: every Python starts with them ignored


@pytest.mark.parametrize("tier", ["", pytest.param("T2", marks=pytest.mark.full)])
def test_nothing_of_a_client_with_jax_and_odd_signals_reaches_it(tier):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CLIENT), tier],
        capture_output=True,
        text=True,
        env={**os.environ, **SET},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    mine = told["mine"]  # the control: the client has all of it
    assert mine["threads"] > 1 and mine["blocked"] and mine["ignored"] & ~PYTHONS_OWN
    assert set(SET) <= set(mine["environment"]) and mine["pipe"] and "jaxlib" in mine["libraries"]
    assert len(told["theirs"]) >= 3  # supervisor, worker, forker
    for one in told["theirs"]:
        assert set(one["environment"]) <= ALLOWED
        assert (one["threads"], one["blocked"], one["pipe"], one["libraries"]) == (1, 0, False, [])
        assert not one["ignored"] & ~PYTHONS_OWN
    assert told["verdicts"] == ["ok", "timeout_cpu", "error", "error"]


HOLES = """
    import ctypes, resource, sys
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    real = ctypes.CDLL
    class Refusing:
        def __init__(self, *name): self.__dict__["libc"] = real(*name)
        def __getattr__(self, name):
            if name == "mallopt":
                return lambda *_: 0
            if name == "sbrk" and sys.argv[1] == "nowhere":
                return lambda _: 0
            return getattr(self.libc, name)
    ctypes.CDLL = Refusing
    from smallmath_jax.verify.sandbox import heap
    heap.gather()
    import decimal, fractions, statistics
    kept = heap.fill_holes()
    print(sum(map(sys.getsizeof, kept)) >> 20)
"""


@pytest.mark.parametrize("heap", ["known", "nowhere"])
def test_holes_are_filled_within_bounds_whatever_the_allocator_does(heap):
    """A large block may be mapped far from all others, where the allocator takes no advice."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOLES), heap],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert int(done.stdout) < 100


def test_an_address_space_with_a_limit_is_kept_to():
    """As after `ulimit -v`: no search above it, which those without rights may not lift."""
    code = f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import resource
        for which, most in (("AS", 8 << 30), ("STACK", 4 << 20), ("NOFILE", 256), ("FSIZE", 1 << 20)):
            resource.setrlimit(getattr(resource, "RLIMIT_" + which), (most, most))
        from sandbox_case import run, small
        from smallmath_jax.verify.sandbox import start_sandbox
        with start_sandbox(small(modules=(), output_bytes=1 << 22)) as sandbox:
            print(run(sandbox, "print(6 * 7)"), sandbox.tier, sandbox.weaker)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert "stdout='42\\n'" in done.stdout, done.stderr[-1000:]
