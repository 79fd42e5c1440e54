"""The warm interpreter that forks once for every program, and what such a fork does. Runs inside the jail.

It never executes a program itself and never reads one: a job lies in a memory file that only the fork opens its
eyes on. So nothing of one program is in the memory of the next.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import os
import random
import resource
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

from smallmath_jax.verify.sandbox import heap, linux, rehearsal

# Descriptors of a forker: job (memory file), control (socket), where prefixes print, where code prints, go (pipe).
JOB, CONTROL, SINK, OUT, GO = 20, 21, 22, 23, 24
OPEN_FILES = 32
OUT_OF_MEMORY = 86  # exit status of a program that ran out of memory
NOT_A_UNIT = (
    87  # exit status of a prefix, or its fork, that only a whole run is right for: to be run anew
)
ASKS_FOR_MORE = 88  # exit status of a light forker's program that imports what is not there
RUN, KEEP = b"r", b"k"
LENGTHS = struct.Struct("<II")  # a job: lengths of prefix and code, then both
_FUTURE = 0x1FF0000  # compiler flags a `from __future__` sets, to be carried from prefix to code

_exit, _timer = os._exit, signal.getitimer  # programs may replace the other names
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_kept: list[object] = []  # what fills holes in the heap

_ALSO = ("math", "fractions", "itertools", "collections", "statistics", "decimal", "datetime", "functools", "operator",
         "re", "string", "json", "typing", "dataclasses", "cmath", "heapq", "bisect", "copy", "time", "random",
         "traceback", "linecache", "collections.abc")  # fmt: skip


def warm(modules: tuple[str, ...]) -> list[str]:
    """Imports everything programs ask for, lets it fill its caches and specialise its code, and brings together what
    it uses (`heap`). Returns the modules that were there."""
    os.environ["SYMPY_CACHE_SIZE"] = "20000"  # a full one drops a result for each new one
    found = []
    for name in (*modules, *_ALSO):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        found.append(name)
    del os.environ["SYMPY_CACHE_SIZE"]
    _seed()  # numpy.random is imported by this, and registers types: caches filled before would be void
    known = {"sympy", "numpy", "mpmath"} <= set(found)
    texts = (*[rehearsal.PLAIN] * 4, *[rehearsal.SYMBOLIC] * known)
    rehearse = lambda first: [_rehearse(f"k = {first + n}\n{text}") for n, text in enumerate(texts)]
    rehearse(2)
    heap.pack_code(heap.calls_of(lambda: rehearse(12)))
    for first in (22, 32, 42):  # other numbers each time: sympy remembers
        rehearse(first)
    _seed()
    return [name for name in found if name in modules]


def _seed() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "sympy.core.random" in sys.modules:  # not in old versions
        sys.modules["sympy.core.random"].seed(0)


def _rehearse(text: str) -> None:
    """Runs a text in this process; what it prints goes nowhere. With a library that cannot, less is warm: no more."""
    sys.stdout = io.TextIOWrapper(io.BytesIO())
    with contextlib.suppress(Exception):
        exec(compile_unit(text, "<rehearsal>", 0), fresh_module().__dict__)
    flush()


class _OnlyTheStandardLibrary:
    """A finder that ends a program that imports anything else: it is run again, from its start, in the warm forker."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] not in sys.stdlib_module_names:
            _exit(ASKS_FOR_MORE)


def stay_light() -> None:
    """Makes this a light forker: it never holds more than the standard library."""
    sys.meta_path.insert(0, _OnlyTheStandardLibrary)


def settle() -> None:
    """Last things before the first fork: standard streams, limits of the language, what leaving runs, the heap."""
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    for name, number in (("stdout", 1), ("stderr", 2)):
        raw = io.FileIO(number, "w", closefd=False)
        lines = name == "stderr"
        stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", line_buffering=lines,
                                  errors="backslashreplace" if lines else "strict")  # fmt: skip
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.__stdin__ = sys.stdin
    sys.argv = sys.orig_argv = ["program.py"]
    for number in (signal.SIGXFSZ, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    atexit._clear()
    fresh_module()  # the rehearsals' names go now, and not in every fork
    gc.collect()
    _kept.extend(heap.fill_holes())
    heap.scatter()
    heap.immortalise()
    heap.collapse()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def limit(memory: int, output: int) -> None:
    """Resource limits every fork inherits. `memory` in bytes on top of what is mapped now."""
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: output + 1,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_AS: mapped() + memory,
    }
    for which, most in wanted.items():
        hard = _at_most(which, most)
        resource.setrlimit(which, (hard, hard))


def _at_most(which: int, wanted: int) -> int:
    """A limit, or the one this process was started under where that is lower: no one may lift it."""
    hard = resource.getrlimit(which)[1]
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def mapped() -> int:
    """Bytes of address space in use, found by asking for one page under ever tighter limits (there is no /proc)."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    old = resource.getrlimit(resource.RLIMIT_AS)
    low, high = 0, _at_most(resource.RLIMIT_AS, 1 << 40)
    while high - low > 4096:
        middle = (low + high) // 2
        resource.setrlimit(resource.RLIMIT_AS, (middle, old[1]))
        page = libc.mmap(None, 4096, 0, 0x22, -1, 0)
        if page in (None, ctypes.c_void_p(-1).value):
            low = middle
        else:
            libc.munmap(page, 4096)
            high = middle
    resource.setrlimit(resource.RLIMIT_AS, old)
    return high


class Kept(NamedTuple):
    """A prefix already executed in this process: its namespace and the compiler flags it set."""

    main: types.ModuleType
    flags: int


def serve(kept: Kept | None, before_program: Callable[[], None]) -> None:
    """Forks at each order; never returns. `kept`: the prefix this process has executed, if any.

    `before_program` is called in each fork before anything of the job is read (a filter, where it is not shared).
    """
    while True:
        order = os.read(CONTROL, 1)
        if not order:
            _exit(0)
        own = _receive_descriptors() if order == KEEP else []
        process = linux.fork_aside()
        if process == 0:
            before_program()
            if order == KEEP:
                _keep(own, before_program)
            _run(kept)
            while True:  # not reached, whatever the program has replaced
                _exit(1)
        for number in own:
            os.close(number)
        os.write(CONTROL, struct.pack("<i", process))


def _receive_descriptors() -> list[int]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, os.dup(CONTROL)) as control:
        return socket.recv_fds(control, 1, 8)[1]


def _run(kept: Kept | None) -> None:
    """One program, in the fork that is its own; never returns."""
    if kept is not None:
        os.read(GO, 1)  # the parent sleeps by now: it never sees its children's programs
    prefix, code = _read_job()
    out = 3 if prefix else -1
    if prefix:
        os.dup2(OUT, out)
        os.dup2(SINK, 1)
    elif kept is not None:
        os.dup2(OUT, 1)
    os.closerange(out + 1 if prefix else 3, OPEN_FILES)
    main = kept.main if kept else fresh_module()
    if kept is not None:
        unit = compile_unit(code, "<code>", kept.flags)
        if isinstance(unit, BaseException):
            _exit(NOT_A_UNIT)
    else:
        first, unit = compile_units(prefix, code)
        if first is not None:
            execute(first, main)
            turn_to_code()
        if prefix:
            os.dup2(out, 1)
            os.close(out)
    if isinstance(unit, BaseException):
        report(unit)
        leave(1)
    execute(unit, main)
    leave(0)


def _keep(own: list[int], before_program: Callable[[], None]) -> None:
    """Becomes a forker that has executed a prefix; never returns."""
    for target, number in zip((JOB, CONTROL, SINK, OUT, GO, 2), own, strict=True):
        os.dup2(number, target)
    linux.close_from(GO + 1)
    linux.close_from(3, JOB - 1)
    os.dup2(SINK, 1)
    prefix, _ = _read_job()
    unit = compile_unit(prefix, "<prefix>", 0)
    if isinstance(unit, BaseException):
        _exit(NOT_A_UNIT)
    main = fresh_module()
    execute(unit, main)
    if any(_timer(which)[0] for which in _TIMERS):
        _exit(NOT_A_UNIT)  # no fork would have it
    turn_to_code()
    os.write(CONTROL, b"kept")
    serve(Kept(main, unit.co_flags & _FUTURE), before_program)


def _read_job() -> tuple[str, str]:
    prefix, code = LENGTHS.unpack(os.pread(JOB, LENGTHS.size, 0))
    text = os.pread(JOB, prefix + code, LENGTHS.size)
    return text[:prefix].decode(), text[prefix:].decode()


def fresh_module() -> types.ModuleType:
    """A new, empty `__main__`."""
    main = types.ModuleType("__main__")
    main.__builtins__ = sys.modules["builtins"]
    sys.modules["__main__"] = main
    return main


def compile_unit(text: str, name: str, flags: int) -> types.CodeType | Exception:
    """A compiled unit, or why there is none."""
    try:
        return compile(text, name, "exec", flags, True)
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
        return error


def compile_units(
    prefix: str, code: str
) -> tuple[types.CodeType | None, types.CodeType | Exception]:
    """Prefix and code, to be run one after the other. The prefix is None where there is none to run by itself: it
    is empty, or only the whole compiles (it stops inside a block), or nothing does."""
    if not prefix:
        return None, compile_unit(code, "<code>", 0)
    first = compile_unit(prefix, "<prefix>", 0)
    if not isinstance(first, BaseException):
        second = compile_unit(code, "<code>", first.co_flags & _FUTURE)
        if not isinstance(second, BaseException):
            return first, second
    whole = compile_unit(prefix + ("" if prefix.endswith("\n") else "\n") + code, "<program>", 0)
    if not isinstance(whole, BaseException):
        return None, whole
    # As when both run from the start: a sound prefix has its effects before the code's fault is met.
    return (None, first) if isinstance(first, BaseException) else (first, second)


def execute(unit: types.CodeType, main: types.ModuleType) -> None:
    """Runs a unit; a failure ends the process as Python would, with the traceback on stderr."""
    try:
        exec(unit, main.__dict__)
    except SystemExit as request:
        leave(_exit_status(request.code))
    except BaseException as error:
        report(error)
        leave(OUT_OF_MEMORY if isinstance(error, MemoryError) else 1)


def _exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if code & 0xFF != OUT_OF_MEMORY else 1
    print(code, file=sys.stderr)
    return 1


def report(error: BaseException) -> None:
    """The traceback from the program's own first line on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        sys.__excepthook__(type(error), error.with_traceback(trace), trace)
    except BaseException:
        os.write(2, type(error).__name__.encode() + b"\n")


def turn_to_code() -> None:
    """What the prefix wrote is dropped."""
    flush()
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)


def flush() -> bool:
    """Writes out what is buffered. False, with the error reported, when that fails."""
    fine = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, ValueError):
            continue  # replaced or closed by the program: its own affair
        except BaseException as error:
            report(error)
            fine = False
    return fine


def leave(status: int) -> None:
    """Ends the process: exit hooks, buffers, status; never returns."""
    try:
        atexit._run_exitfuncs()
        fine = flush()
    except BaseException:
        fine = False
    while True:
        _exit(status if fine or status else 1)
