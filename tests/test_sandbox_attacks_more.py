# ruff: noqa: E501 (programs keep their lines)
"""Attacks with a count or a control: all memory is read, and processes are counted from outside while forks are tried."""

import os
import pathlib
import subprocess
import sys
import threading
import time
import types

import pytest
from sandbox_case import run, run_all, small

from smallmath_jax.verify.sandbox import start_sandbox

TIERS = [
    pytest.param("", id="strongest"),
    pytest.param("T2", id="without-namespaces", marks=pytest.mark.full),
]


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request):
    with start_sandbox(small(tier=request.param, cpu_seconds=20.0, modules=())) as started:
        yield started


# ---- memory

# Every page between the lowest and the highest address that is known to be in use is asked for, and so is the stack;
# rt_sigprocmask reads eight bytes of an address and says EFAULT (14) where it cannot, EINVAL where it can. The texts
# looked for are never spelt out in here, so whatever is found was left by another, or is the program's own control.
SCAN = r"""
import ctypes, gc, platform, re, sys
call = ctypes.CDLL(None, use_errno=True).syscall
call.argtypes, call.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long], ctypes.c_long
NUMBER, PAGE = 14 if platform.machine() == "x86_64" else 135, 4096
def readable(address):
    call(NUMBER, 99, address, None, 8)
    return ctypes.get_errno() != 14
own = bytes(reversed(b"lortnoc-nwo-ym"))
other, control = re.compile(b"needl[e]-in-a-haystac[k]"), re.compile(b"my-ow[n]-contro[l]")
libc = ctypes.CDLL(None)
address = lambda function: ctypes.cast(function, ctypes.c_void_p).value
stack = ctypes.c_void_p.in_dll(libc, "environ").value
known = {id(thing) for thing in gc.get_objects()} | {id(t) for thing in gc.get_objects() for t in gc.get_referents(thing)}
known |= {id(own), address(libc.malloc), address(ctypes.pythonapi.Py_IsInitialized)}
groups = []
for place in sorted({one // PAGE for one in known} | {stack // PAGE}):
    if groups and place - groups[-1][1] < (1 << 33) // PAGE:
        groups[-1][1] = place
    else:
        groups.append([place, place])
regions, margin = [], (16 << 20) // PAGE
for low, high in groups:
    for page in range(max(low - margin, 1), high + margin):
        if readable(page * PAGE):
            if regions and regions[-1][1] == page:
                regions[-1][1] = page + 1
            else:
                regions.append([page, page + 1])
pages = sum(end - start for start, end in regions)
inside = sum(any(start <= one // PAGE < end for start, end in regions) for one in list(known)[::97])
found = [0, 0]
for start, end in regions:
    for page in range(start, end, 256):
        data = ctypes.string_at(page * PAGE, (min(page + 256, end) - page) * PAGE)
        found[0] += other.search(data) is not None
        found[1] += control.search(data) is not None
        del data
print(found[0], found[1], pages, inside == len(list(known)[::97]))
"""
SECRET = "secret = 'needle-in-' + 'a-haystack'\nprint(secret)"


def test_no_readable_page_holds_anything_of_another_program(sandbox):
    assert (
        run(sandbox, SECRET, prefix="other = 'needle-in-a-haystack'").stdout
        == "needle-in-a-haystack\n"
    )
    result = run(sandbox, SCAN)
    assert result.status == "ok", result.stderr_tail
    leaked, own, pages, whole = result.stdout.split()
    assert (leaked, whole) == ("0", "True") and int(own) >= 1, "its own text must be found"
    assert int(pages) > 2000, "an interpreter of more than 8 MB was read"
    # The control: the same scan behind a prefix that holds the text, which is no other program
    found = run(sandbox, SCAN, prefix="mine = 'needle-in-a-haystack'")
    assert found.status == "ok" and int(found.stdout.split()[0]) >= 1, found.stderr_tail
    assert run(sandbox, SCAN + "\n").stdout.split()[0] == "0", "and it is gone with that prefix"


# ---- processes


def members(sandbox):
    """Process ids in the session of the sandbox: no program can leave it."""
    found = set()
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == sandbox._process.pid and fields[0] != "Z":
                found.add(int(entry.name))
    return found


def most_members(sandbox, act):
    """What `act` returns, and the largest number of processes there were meanwhile."""
    seen, done = [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(len(members(sandbox)))
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = act()
    finally:
        done.set()
        thread.join()
    return result, max(seen)


def settled(sandbox, count):
    """Whether at most `count` processes are left, within some seconds."""
    until = time.monotonic() + 20
    while len(members(sandbox)) > count and time.monotonic() < until:
        time.sleep(0.05)
    return len(members(sandbox)) <= count


BOMBS = {
    "fork": "import os\nwhile True:\n    try:\n        n += os.fork() == 0\n    except OSError: pass",
    "clone": "import ctypes, platform\nlibc = ctypes.CDLL(None)\nnumber = 56 if platform.machine() == 'x86_64' else 220\nwhile True: n += libc.syscall(number, 17, 0, 0, 0, 0) >= 0",
    "as the forker does": "import ctypes, platform\nlibc = ctypes.CDLL(None)\nnumber = 56 if platform.machine() == 'x86_64' else 220\nwhile True: n += libc.syscall(number, 0x8000 | 17, 0, 0, 0, 0) >= 0",
    "threads": "import _thread\nwhile True:\n    try:\n        _thread.start_new_thread(print, ()); n += 1\n    except RuntimeError: pass",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_fork_bomb_makes_no_process_at_all(sandbox, name):
    code = f"n = 0\n{BOMBS[name]}"
    at_rest = len(members(sandbox))
    result, most = most_members(sandbox, lambda: run(sandbox, code))
    assert result.status in ("killed", "timeout_cpu", "error")
    assert most <= at_rest + 1, "the program itself"
    assert settled(sandbox, at_rest)
    counted = code.replace("while True", "for _ in range(50)")
    assert run(sandbox, counted + "\nprint('made', n)").stdout == "made 0\n"


def test_processes_would_be_seen():
    """The control: children of a process that may fork are counted, while they live and not longer."""
    code = "import os, time\nfor _ in range(3):\n    if os.fork() == 0: time.sleep(1); os._exit(0)\nfor _ in range(3): os.wait()"
    start = lambda: subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    with start() as process:
        watched = types.SimpleNamespace(_process=process)
        _, most = most_members(watched, process.wait)
    assert most == 4 and not members(watched)


# What a program or its prefix may try so that something outlives it
SURVIVORS = {
    "a child that sleeps": ("", "import os, time\ntry:\n    if os.fork() == 0: time.sleep(60)\nexcept OSError: pass"),
    "a daemon": ("", "import os, time\ntry:\n    os.setsid()\n    if os.fork() == 0 and os.fork() == 0: time.sleep(60)\nexcept OSError: pass"),
    "a prefix that forks in every program's turn": ("import os\nread = os.read\nos.read = lambda *a: os.fork() if a[0] > 2 else read(*a)", "pass"),
    "a prefix whose fork goes on as another": ("import os, time\nexit = os._exit\ndef stay(*a):\n    time.sleep(60)\nos._exit = stay", "pass"),
    "a prefix that never ends its turn": ("import os, signal\nfor n in range(1, 65):\n    try: signal.signal(n, lambda *_: None)\n    except (OSError, ValueError): pass\nos._exit = lambda *_: signal.pause()", "pass"),
    "a thread": ("", "import threading, time\ntry: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nexcept RuntimeError: pass"),
}  # fmt: skip


def test_nothing_outlives_its_program():
    """Counted from outside: after every attack, kept prefixes apart, only what was there before is left."""
    settings = small(modules=(), snapshots=3, wall_seconds=3.0)
    with start_sandbox(settings) as sandbox:
        assert run(sandbox, "print(1)").stdout == "1\n"
        at_rest = members(sandbox)
        for prefix, code in SURVIVORS.values():
            run_all(sandbox, *(f"{code}\n# {n}" for n in range(3)), prefix=prefix)
            assert run(sandbox, "print(2)").stdout == "2\n"
        assert settled(sandbox, len(at_rest) + settings.snapshots)
        for number in range(
            settings.snapshots
        ):  # ordinary prefixes take the places of the kept ones
            codes = (f"print(x + {n})" for n in range(3))
            results = run_all(sandbox, *codes, prefix=f"x = {number} * 10")
            assert [int(one.stdout) for one in results] == [10 * number + n for n in range(3)]
        assert settled(sandbox, len(at_rest) + settings.snapshots)
        everyone = members(sandbox)
    until = time.monotonic() + 20
    while (
        left := [one for one in everyone if os.path.exists(f"/proc/{one}")]
    ) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left, "and with its client everything ends"
