# ruff: noqa: E501 (programs keep their lines)
"""Programs that attack the sandbox. Nothing escapes, and the next program runs and is right."""

import os
import pathlib
import socket
import threading

import pytest
from sandbox_case import run, run_all, small

from smallmath_jax.verify.sandbox import start_sandbox

# The weaker tier repeats every attack: in the full CI.
TIERS = [
    pytest.param("", id="strongest"),
    pytest.param("T2", id="without-namespaces", marks=pytest.mark.full),
]
# What an attack prints when it came through; a refusal is any exception.
TRY = """
def attempt(name, action):
    try:
        value = action()
    except BaseException as error:
        return
    print("ESCAPED", name, repr(value)[:200])
"""
CALL = """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(x86, arm, *arguments):
    number = x86 if platform.machine() == "x86_64" else arm
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
"""


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request):
    with start_sandbox(small(tier=request.param)) as started:
        yield started


@pytest.fixture(autouse=True)
def still_sound(request):
    """After every attack the next program runs and is right."""
    yield
    if "sandbox" not in request.fixturenames:
        return
    sandbox = request.getfixturevalue("sandbox")
    prefix, code = "import sympy\nx = sympy.Symbol('x')", "print(sympy.factor(x**2 - 1), 6 * 7)"
    for result in run_all(sandbox, code, code + "\n", prefix=prefix):
        assert (result.status, result.stdout) == ("ok", "(x - 1)*(x + 1) 42\n")


def nothing_escapes(sandbox, code, prefix=""):
    for mark in ("# sympy", ""):  # in the warm forker, then in the light one
        result = run(sandbox, TRY + CALL + code + mark, prefix)
        assert "ESCAPED" not in result.stdout, result.stdout
    return result


def test_files_of_the_host_cannot_be_read(sandbox, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("gold")
    os.chmod(secret, 0o644)
    here = pathlib.Path(__file__).resolve()
    places = [
        secret,
        here,
        here.parents[1] / "README.md",
        here.parents[1] / "smallmath_jax" / "records.py",
        pathlib.Path.home() / ".bashrc",
        *map(
            pathlib.Path,
            ("/etc/shadow", "/etc/hostname", "/etc/hosts", "/proc/self/environ", "/proc/1/cmdline"),
        ),
        *map(pathlib.Path, ("/proc/self/maps", "/sys/kernel/notes", "/dev/kmsg", "/dev/mem")),
    ]
    result = nothing_escapes(
        sandbox,
        f"""
import os
for place in {[str(place) for place in places]}:
    attempt(place, lambda: open(place, "rb").read(1))
    attempt(place, lambda: os.open(place, os.O_RDONLY))
for folder in ("/root", "/home", "/proc", "/sys", "/var", "/run", "/proc/self/fd", "/dev/shm", {str(tmp_path)!r}):
    attempt(folder, lambda: os.listdir(folder))
attempt("/", lambda: os.listdir("/"))
print(sorted(os.environ))
""",
    )
    assert result.status == "ok", result.stderr_tail
    known = ["HOME", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TMPDIR"]
    assert result.stdout == f"{known}\n"


def test_nothing_is_written_outside_the_scratch_folder(sandbox, tmp_path):
    os.chmod(tmp_path, 0o777)
    nothing_escapes(
        sandbox,
        f"""
import os, sympy
folders = ["/", "/usr/lib", "/etc", "/dev", "/dev/shm", "/var/tmp", {str(tmp_path)!r}, os.path.dirname(sympy.__file__)]
for folder in folders:
    attempt(folder, lambda: open(folder + "/written", "w"))
    attempt(folder, lambda: os.mkdir(folder + "/made"))
attempt("a library", lambda: open(sympy.__file__, "r+"))
attempt("truncate", lambda: os.truncate(sympy.__file__, 0))
attempt("chmod", lambda: os.chmod(sympy.__file__, 0o777))
attempt("times", lambda: os.utime(sympy.__file__))
attempt("owner", lambda: os.chown(sympy.__file__, os.getuid(), os.getgid()))
attempt("attribute", lambda: os.setxattr(sympy.__file__, "user.x", b"x"))
attempt("unlink", lambda: os.unlink(sympy.__file__))
attempt("rename", lambda: os.rename(sympy.__file__, sympy.__file__ + "x"))
""",
    )
    assert not list(tmp_path.iterdir())


def test_own_files_outside_are_left_alone(sandbox, tmp_path):
    """As the user the sandbox runs for, permissions and times might be changed where contents may not."""
    mine = tmp_path / "mine"
    mine.write_text("x")
    os.chmod(mine, 0o600)
    os.utime(mine, (1, 1))
    nothing_escapes(
        sandbox,
        f"""
import os
for place in ({str(mine)!r}, {str(tmp_path)!r}):
    attempt("chmod", lambda: os.chmod(place, 0o777))
    attempt("utime", lambda: os.utime(place, (2, 2)))
    attempt("truncate", lambda: os.truncate(place, 0))
    attempt("unlink", lambda: os.unlink(place))
    attempt("rename", lambda: os.rename(place, place + "2"))
    attempt("chown", lambda: os.chown(place, 65534, 65534))
""",
    )
    state = mine.stat()
    assert (state.st_mode & 0o777, state.st_mtime, mine.read_text()) == (0o600, 1, "x")


def test_the_null_device_is_the_hosts_and_cannot_be_changed(sandbox):
    code = """
import os
if os.path.exists("/python"):
    for action in (lambda: os.chmod("/dev/null", 0o600), lambda: os.utime("/dev/null"), lambda: os.truncate("/dev/null", 0)):
        try:
            action()
            print("changed")
        except OSError as error:
            print(error.strerror)
    print("x" * 9, file=open(os.devnull, "w"))
    print(repr(open(os.devnull).read()))
"""
    shown = "Read-only file system\n" * 2 + "Invalid argument\n''\n"
    assert run(sandbox, code).stdout in (shown, "")


def test_spoiling_the_scratch_folder_itself_spoils_nothing(sandbox):
    before = sandbox.counters()["restarts"]
    spoil = """
import os
for action in (lambda: os.chmod("/tmp", 0), lambda: os.utime("/tmp", (1, 1)), lambda: os.rename("/tmp", "/t")):
    try:
        action()
    except OSError:
        pass
"""
    assert run(sandbox, spoil).status == "ok"
    look = "import os\nif os.path.exists('/python'): open('/tmp/x', 'w').write('x'); print(os.listdir('/tmp'))"
    assert run(sandbox, look).stdout in ("['x']\n", "")
    assert sandbox.counters()["restarts"] == before


def test_links_lead_nowhere(sandbox):
    nothing_escapes(
        sandbox,
        """
import os
attempt("symlink", lambda: (os.symlink("/etc/shadow", "/tmp/a"), open("/tmp/a").read()))
attempt("link", lambda: (os.link("/etc/passwd", "/tmp/b"), open("/tmp/b", "w")))
attempt("fifo", lambda: os.mkfifo("/tmp/c"))
attempt("node", lambda: os.mknod("/tmp/d", 0o666 | 0o20000, os.makedev(1, 1)))
attempt("up", lambda: open("../../../../../../etc/hostname"))
attempt("chroot", lambda: os.chroot("/tmp"))
""",
    )


def test_no_network_and_no_sockets_of_any_kind(sandbox):
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind("\0smallmath-sandbox-test")
    server.listen()
    listener = socket.create_server(("127.0.0.1", 0))
    result = nothing_escapes(
        sandbox,
        f"""
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 16, 17, 38, 40):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        attempt(f"socket {{family}} {{kind}}", lambda: socket.socket(family, kind))
attempt("connect", lambda: socket.create_connection(("127.0.0.1", {listener.getsockname()[1]}), 1))
attempt("pair", socket.socketpair)
attempt("inherited", lambda: [socket.socket(fileno=n) for n in range(3, 64)][0])
attempt("names", lambda: socket.getaddrinfo("example.com", 80))
""",
    )
    server.close()
    listener.close()
    assert result.status == "ok", result.stderr_tail


def test_no_processes_and_no_threads(sandbox):
    result = nothing_escapes(
        sandbox,
        """
import os, subprocess, threading, multiprocessing
attempt("fork", os.fork)
attempt("forkpty", os.forkpty)
attempt("system", lambda: 1 / (os.system("true") == 0))
attempt("run", lambda: subprocess.run(["/bin/true"]))
attempt("spawn", lambda: os.posix_spawn("/usr/bin/true", ["true"], {}))
attempt("thread", lambda: threading.Thread(target=print).start())
attempt("process", lambda: multiprocessing.Process(target=print).start())
attempt("exec", lambda: os.execv("/usr/bin/python3", ["python3"]))
attempt("vfork", lambda: call(58, 9999))
attempt("clone3", lambda: call(435, 435, bytes(88), 88))
attempt("clone thread", lambda: call(56, 220, 0x10000 | 0x800 | 0x100, 0, 0, 0, 0))
attempt("clone as the forker does", lambda: call(56, 220, 0x8000 | 17, 0, 0, 0, 0))
attempt("clone", lambda: call(56, 220, 17, 0, 0, 0, 0))
attempt("execveat", lambda: call(322, 281, -100, b"/usr/bin/true", 0, 0, 0))
""",
    )
    assert result.status == "ok", result.stderr_tail


def test_a_fork_bomb_ends_at_its_limits(sandbox):
    code = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert run(sandbox, code).status == "killed"


@pytest.mark.parametrize(
    "code",
    [
        "a = [0] * 10**9",
        "a = []\nwhile True: a.append('x' * 10**6 + str(len(a)))",
        "import numpy as np\na = np.ones(10**9)",
        "import numpy as np\na = []\nwhile True: a.append(np.zeros(10**6))",
        "import sympy\na = 'x'\nwhile True: a += a",
    ],
)
def test_memory_is_limited(sandbox, code):
    assert run(sandbox, code).status == "out_of_memory"


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "9**9**9",
        "import re\nre.match('(a|aa)+$', 'a' * 60 + 'b')",
        "sum(range(10**12))",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, lambda *_: None)\n    except (OSError, ValueError): pass\nwhile True: pass",
        "import resource\ntry: resource.setrlimit(resource.RLIMIT_CPU, (99, 99))\nexcept (OSError, ValueError): pass\nwhile True: pass",
        "class Stay:\n    def __del__(self):\n        while True: pass\nStay()",
        "import atexit\n@atexit.register\ndef stay():\n    while True: pass",
        "import gc\ngc.callbacks.append(lambda *_: exec('while True: pass'))\ngc.collect()",
    ],
)
def test_cpu_time_is_limited_whatever_is_caught(sandbox, code):
    result = run(sandbox, code)
    assert result.status == "timeout_cpu"
    assert 350 < result.cpu_ms < 2000


@pytest.mark.parametrize(
    "code, stdout",
    [
        ("print('x' * 10_000_000)", 100_000),
        ("import sys\nwhile True: sys.stdout.write('x' * 1000)", 100_000),
        ("import sys\nsys.stderr.write('x' * 10_000_000)", 0),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", 100_000),
        (
            "import os, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfor _ in range(200): os.write(1, b'x' * 999)",
            100_000,
        ),
        ("import os\nos.lseek(1, 10**12, 0)\nos.write(1, b'x')", 0),
        ("import os\nos.ftruncate(1, 10**12)", 0),
    ],
)
def test_output_is_capped(sandbox, code, stdout):
    result = run(sandbox, code)
    assert (result.status, len(result.stdout)) == ("output_cap", stdout)
    assert len(result.stderr_tail) <= 2000


def test_output_of_exactly_the_limit_passes(sandbox):
    result = run(sandbox, "print('x' * 99_999)")
    assert (result.status, len(result.stdout)) == ("ok", 100_000)


def test_huge_integers_are_not_written_out(sandbox):
    result = run(sandbox, "print(str(10**10_000))")
    assert result.status == "error" and "ValueError" in result.stderr_tail
    assert run(sandbox, "import sys; sys.set_int_max_str_digits(0); print(len(str(7**(10**8))))").status in (
        "timeout_cpu", "out_of_memory",
    )  # fmt: skip


@pytest.mark.parametrize(
    "code",
    [
        "def f(n): return f(n + 1)\nf(0)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
        "import sys\nsys.setrecursionlimit(10**9)\na = []\nfor _ in range(10**5): a = [a]\nrepr(a)",
        "import ctypes; ctypes.string_at(0)",
        "import os; os.abort()",
        "import ctypes; ctypes.CDLL(None).exit_group; ctypes.CDLL(None).raise_(11)",
    ],
)
def test_crashes_are_errors_of_the_program(sandbox, code):
    assert run(sandbox, code).status in ("error", "out_of_memory", "timeout_cpu")


def test_descriptors_are_not_inherited(sandbox):
    result = nothing_escapes(
        sandbox,
        """
import os
for number in range(3, 1024):
    attempt(f"fstat {number}", lambda: os.fstat(number))
    attempt(f"write {number}", lambda: os.write(number, b"forged"))
""",
        prefix="x = 1",
    )
    assert result.status == "ok"
    for prefix in ("", "y = 1"):
        results = run_all(
            sandbox,
            *(f"import os\n{pad}os.write(5, b'x')" for pad in ("", "pass\n")),
            prefix=prefix,
        )
        assert {result.status for result in results} == {"error"}


def test_nobody_can_be_signalled(sandbox):
    nothing_escapes(
        sandbox,
        """
import os, signal, fcntl
for target in (1, 2, 3, os.getppid(), -1, 0, -os.getpgrp()):
    for number in (0, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        attempt(f"kill {target} {number}", lambda: os.kill(target, number))
    attempt("pidfd", lambda: os.pidfd_open(max(target, 1)))
    attempt("tgkill", lambda: call(234, 131, target, target, 9))
    attempt("sigqueue", lambda: call(129, 138, target, 9, bytes(128)))
    attempt("owner", lambda: fcntl.fcntl(1, fcntl.F_SETOWN, target))
attempt("signal of an owner", lambda: fcntl.fcntl(1, 10, 9))
attempt("priority", lambda: os.setpriority(os.PRIO_USER, 0, 19))
attempt("timer", lambda: call(222, 107, 0, bytes(64), bytes(8)))
""",
    )  # fmt: skip


def test_other_processes_memory_cannot_be_read(sandbox):
    nothing_escapes(
        sandbox,
        """
import os
parent = os.getppid()
attempt("mem", lambda: open(f"/proc/{parent}/mem", "rb"))
attempt("ptrace", lambda: call(101, 117, 16, parent, 0, 0))
attempt("ptrace me", lambda: call(101, 117, 0, 0, 0, 0))
attempt("readv", lambda: call(310, 270, parent, bytes(16), 1, bytes(16), 1, 0))
attempt("writev", lambda: call(311, 271, parent, bytes(16), 1, bytes(16), 1, 0))
attempt("getfd", lambda: call(438, 438, 3, 3, 0))
attempt("kcmp", lambda: call(312, 272, parent, os.getpid(), 0, 0, 0))
""",
    )


def test_kernel_doors_are_shut(sandbox):
    nothing_escapes(
        sandbox,
        """
doors = {
    "bpf": (321, 280), "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount": (166, 39), "pivot_root": (155, 41), "open_tree": (428, 428), "fsopen": (430, 430),
    "keyctl": (250, 219), "add_key": (248, 217), "perf_event_open": (298, 241), "memfd_create": (319, 279),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "inotify_init1": (294, 26),
    "fanotify_init": (300, 262), "quotactl": (179, 60), "swapon": (167, 224), "reboot": (169, 142),
    "init_module": (175, 105), "kexec_load": (246, 104), "iopl": (172, 9999), "personality": (135, 92),
    "setuid": (105, 146), "setgroups": (116, 159), "capset": (126, 91), "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444), "splice": (275, 76), "vmsplice": (278, 75), "tee": (276, 77),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "process_madvise": (440, 440),
    "epoll_create1": (291, 20), "eventfd2": (290, 19), "signalfd4": (289, 74), "timerfd_create": (283, 85),
    "setsid": (112, 157), "sethostname": (170, 161), "modify_ldt": (154, 9999), "move_pages": (279, 239),
    "sched_setaffinity": (203, 122), "clock_settime": (227, 112), "syslog": (103, 116), "acct": (163, 89),
}
for name, numbers in doors.items():
    attempt(name, lambda: call(*numbers, 0, 0, 0, 0, 0))
attempt("personality", lambda: call(135, 92, 0xFFFFFFFF))
attempt("x32", lambda: call(0x40000000 + 39, 9999))
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, 4096, 3, 0x22, -1, 0)
for advice in (9, 10, 12, 18, 100, 101):
    attempt(f"madvise {advice}", lambda: call(28, 233, page, 4096, advice))
for option in range(1, 80):
    attempt(f"prctl {option}", lambda: call(157, 167, option, 0, 0, 0, 0))
attempt("shared memory", lambda: __import__("mmap").mmap(-1, 4096))
attempt("seal", lambda: __import__("fcntl").fcntl(1, 1033, 15))
attempt("terminal", lambda: __import__("fcntl").ioctl(1, 0x5412, b"x"))
""",
    )


def test_calls_of_the_32_bit_kind_end_the_program(sandbox):
    """int 0x80 with eax = 20 (getpid): another numbering, which the filter must not read as its own."""
    code = """
import ctypes, mmap, platform
assert platform.machine() == "x86_64"
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
page = libc.mmap(None, 4096, 7, 0x22, -1, 0)
ctypes.memmove(page, bytes.fromhex("b814000000cd80c3"), 8)
print("ESCAPED", ctypes.CFUNCTYPE(ctypes.c_int)(page)())
"""
    result = run(sandbox, code)
    assert result.status == "error" and "ESCAPED" not in result.stdout


def test_nothing_of_one_program_is_seen_by_another(sandbox):
    stain = """
import builtins, math, sympy, sys, os, random, gc, decimal
leaked = "MARK" + "ER"
builtins.leaked = math.leaked = sympy.leaked = leaked
sympy.solve = math.sqrt = builtins.print = None
sys.modules["leaked"] = sys; os.environ["LEAKED"] = leaked; os.umask(0o777); os.chdir("/")
random.seed(5); decimal.getcontext().prec = 3; sys.setrecursionlimit(77)
try:
    os.mkdir("/tmp/folder"); open("/tmp/folder/leaked", "w").write(leaked); os.chmod("/tmp/folder", 0)
except OSError:
    pass
"""
    look = """
import gc, math, os, random, sys, sympy, decimal
seen = [name for name in (globals(), vars(math), vars(sympy), sys.modules, os.environ) if "leaked" in name or "LEAKED" in name]
texts = [thing for thing in gc.get_objects() if isinstance(thing, dict) and ("MARK" + "ER") in map(str, list(thing.values())[:50])]
print(seen, len(texts), os.listdir("/tmp") if os.path.exists("/python") else [], math.sqrt(4), random.random(), decimal.getcontext().prec, sys.getrecursionlimit())
"""
    before, stained, after = (run(sandbox, code) for code in (look, stain, look))
    assert stained.status == "ok", stained.stderr_tail
    assert before.status == "ok" and before.stdout == after.stdout
    assert before.stdout.startswith("[] 0 [] 2.0 0.844")  # random.seed(0)


@pytest.mark.parametrize("prefix", ["", "z = 1"])
def test_what_programs_share_is_as_it_was(sandbox, prefix):
    """The open file behind stdin; the scratch folder's times and permissions."""
    look = """
import fcntl, os
place = os.stat("/tmp") if os.path.exists("/python") else None
print(fcntl.fcntl(0, fcntl.F_GETFL), place and (place.st_mtime_ns, place.st_mode))
"""
    stain = """
import fcntl, os
fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)
fcntl.flock(0, fcntl.LOCK_EX)
if os.path.exists("/python"): os.utime("/tmp", (77, 77)); os.chmod("/tmp", 0o500)
"""
    codes = (look, stain, look + "#", stain + "os.chmod('/tmp', 0)", look + "##")
    results = run_all(sandbox, *codes, prefix=prefix)
    assert results[1].status == "ok", results[1].stderr_tail
    assert len({result.stdout for result in results[::2]}) == 1, results


def test_the_forkers_memory_holds_no_other_program(sandbox):
    """All readable memory of a program is searched, by its own map of pages, for the text of the one before."""
    run(
        sandbox,
        "secret = 'needle' + '-in-a-haystack'\nprint(secret)",
        prefix="other = 'needle-in-prefix'",
    )
    result = run(
        sandbox,
        """
import ctypes, gc, sys
needles = [bytes(reversed(text)) for text in (b"kcatsyah-a-ni-'", b"xiferp-ni-eldeen")]
libc = ctypes.CDLL(None)
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
import os
sink = os.open("/dev/null", os.O_WRONLY)
libc.access.argtypes = [ctypes.c_void_p, ctypes.c_int]
def readable(address):
    return libc.access(address, 0) == -1 and ctypes.get_errno() != 14
found = 0
blocks = {id(thing) >> 16 for thing in gc.get_objects()}
own = {id(needles[0]) >> 16, id(needles[1]) >> 16}
for block in blocks - own:
    data = ctypes.string_at(block << 16, 1 << 16)
    found += any(needle in data for needle in needles)
print(found)
""",
    )
    assert (result.status, result.stdout) == ("ok", "0\n"), result.stderr_tail


def test_the_interpreter_tells_nothing(sandbox):
    result = run(
        sandbox,
        """
import sys
frame, names = sys._getframe(), []
while frame:
    names.append(frame.f_code.co_name)
    frame = frame.f_back
main = sys.modules["__main__"]
print(main.__dict__ is globals(), sorted(k for k in vars(main) if not k.startswith("__")))
print(sys.argv)
""",
    )
    assert result.stdout == "True ['frame', 'main', 'names', 'sys']\n['program.py']\n"


@pytest.mark.parametrize(
    "code, status",
    [
        ('import os\nprint(\'{"status": "ok"}\', flush=True)\nos._exit(3)', "error"),
        ("import os\nos._exit(0)", "ok"),
        ("raise SystemExit", "ok"),
        ("raise SystemExit(0)", "ok"),
        ("raise SystemExit(2)", "error"),
        ("raise SystemExit('words')", "error"),
        ("raise SystemExit(86)", "error"),
        ("import sys\nsys.stdout.close()", "ok"),
        ("import os\nos.close(1); os.close(2); os.close(0)", "ok"),
        ("import os\nos.closerange(0, 100)", "ok"),
        ("import sys\nsys.stdout = sys.stderr = None", "ok"),
        ("import sys\nsys.excepthook = sys.__excepthook__ = print\n1/0", "error"),
        ("raise KeyboardInterrupt", "error"),
        ("raise GeneratorExit", "error"),
        ("class E(BaseException):\n    def __str__(self): raise self\nraise E", "error"),
        (
            "import builtins\nbuiltins.exec = builtins.BaseException = builtins.compile = None\n1/0",
            "error",
        ),
        ("import os\nos._exit = lambda status: None", "ok"),
    ],
)
def test_verdicts_cannot_be_forged(sandbox, code, status):
    assert run(sandbox, code).status == status


def test_a_forgery_does_not_reach_the_next_results(sandbox):
    forged = "import os, struct\nfor n in range(3, 40):\n    try: os.write(n, struct.pack('<QB', 1, 0) * 100)\n    except OSError: pass\nos._exit(0)"
    results = run_all(sandbox, "print(1)", forged, "1/0", forged + "\n", "print(2)")
    assert [result.status for result in results] == ["ok", "ok", "error", "ok", "ok"]
    assert [result.stdout for result in results] == ["1\n", "", "", "", "2\n"]


def test_stdin_is_at_its_end(sandbox):
    result = run(sandbox, "import sys\nprint(repr(sys.stdin.read()))\ninput()")
    assert (result.status, result.stdout) == ("error", "''\n")
    assert "EOFError" in result.stderr_tail


def test_the_scratch_folder_is_bounded_and_emptied(sandbox):
    code = """
import os
try:
    for n in range(100000):
        with open(f"/tmp/{n}", "wb") as file: file.write(b"x" * 50_000)
except OSError as error:
    print(type(error).__name__)
"""
    result = run(sandbox, code)
    assert result.stdout in ("OSError\n", "PermissionError\n")
    deep = "import os\nfor _ in range(2000):\n    os.mkdir('d'); os.chdir('d')"
    assert run(sandbox, deep).status in ("error", "ok")
    look = "import os; print(os.listdir('/tmp') if os.path.exists('/python') else [])"
    assert run(sandbox, look).stdout == "[]\n"


HOSTILE_PREFIXES = {
    "closes what it finds": "import os\nos.closerange(3, 1000)",
    "forks": "import os\ntry: os.fork()\nexcept OSError: pass",
    "replaces the loop's tools": "import os, socket, struct\nos.read = os.write = os.pread = lambda *a: b'kept'",
    "names another process": "import os, struct\nwrite = os.write\nos.write = lambda n, data: write(n, struct.pack('<i', 2))",
    "says it is kept and goes on": "import os\nos.write(21, b'kept')\nwhile True: pass",
    "lies and dies": "import os\nos.write(21, b'kept')\nos._exit(0)",
    "keeps working by a timer": "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)",
    "answers for its children": "import os\nread = os.read\nos.read = lambda *a: os.fork() if a[0] == 21 else read(*a)",
    "never hears the order": "import os, time\nos.read = lambda *a: time.sleep(1000)",
    "keeps a file open": "try:\n    held = open('/tmp/held', 'w+')\nexcept OSError: pass",
    "keeps a nameless file": "import tempfile\ntry:\n    held = tempfile.TemporaryFile()\nexcept OSError: pass",
    "exits": "raise SystemExit",
    "replaces exec": "import builtins\nbuiltins.exec = lambda *a: print('forged')",
}


@pytest.mark.parametrize("name", HOSTILE_PREFIXES)
def test_a_hostile_prefix_harms_only_its_own_programs(sandbox, name):
    prefix = HOSTILE_PREFIXES[name]
    programs = [(prefix, f"print({n})") for n in range(3)]
    programs[1:1] = [("", "print('other')"), ("y = 3", "print(y)"), ("y = 3", "print(y + 1)")]
    results = sandbox.run_many(programs)
    assert [(r.status, r.stdout) for r in results[1:4]] == [
        ("ok", text + "\n") for text in ("other", "3", "4")
    ]


def test_siblings_share_nothing_but_the_prefix(sandbox):
    prefix = """
import os, mmap, tempfile
shared = []
try:
    held = tempfile.TemporaryFile()
except OSError:
    held = None
try:
    pages = mmap.mmap(-1, 4096)
except OSError:
    pages = None
"""
    code = """
shared.append(1)
if held: print(held.seek(0, 2)); held.write(b"x"); held.flush()
if pages: print(pages[0]); pages[0] = 1
print(shared)
"""
    results = run_all(sandbox, *(code + f"# {n}" for n in range(4)), prefix=prefix)
    assert len({result.stdout for result in results}) == 1 and results[0].status == "ok"


def test_waiting_is_ended_by_the_wall_clock():
    codes = (
        "import time; time.sleep(1000)",
        "import select; select.select([], [], [])",
        "import signal; signal.pause()",
    )
    with start_sandbox(small(wall_seconds=1.0, modules=())) as sandbox:
        for code in codes:
            result = run(sandbox, code)
            assert result.status == "timeout_wall" and 900 < result.wall_ms < 20_000
        assert run(sandbox, "print(1)").stdout == "1\n"


def test_threads_of_the_client_do_not_matter():
    """It may be started and used from a thread, beside others."""
    seen = []

    def use():
        with start_sandbox(small(modules=())) as sandbox:
            seen.append(run(sandbox, "print(1)").stdout)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == ["1\n"]
