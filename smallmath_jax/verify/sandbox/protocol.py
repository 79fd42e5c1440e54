"""What crosses between client, supervisor and workers: settings, results, and frames of bytes (no pickles)."""

import dataclasses
import struct
from collections.abc import Iterator

STATUSES = (
    "ok",
    "error",
    "timeout_cpu",
    "timeout_wall",
    "out_of_memory",
    "output_cap",
    "killed",
    "rejected",
)
# The same program gives these again; a wall-clock limit or a kill from outside says nothing about the program.
REPEATABLE = frozenset({"ok", "error", "timeout_cpu", "out_of_memory", "output_cap", "rejected"})


@dataclasses.dataclass(frozen=True)
class SandboxSettings:
    """How the sandbox runs programs. Limits are per program (prefix and code together) unless said otherwise."""

    workers: int = 0  # programs at a time; 0: one for each core this process may use
    cpu_seconds: float = 5.0  # the verdict
    wall_seconds: float = 30.0  # a backstop, for programs that sleep
    memory_mb: int = 1024  # address space on top of the warm interpreter's
    output_bytes: int = 1 << 20  # of stdout, of stderr, and of any file
    stderr_tail: int = 2000  # bytes of stderr kept
    program_bytes: int = 1 << 20  # longer programs are rejected
    snapshots: int = 8  # prefixes a worker keeps executed; 0: prefixes run anew for every sibling
    snapshot_memory_mb: int = 256  # memory a kept prefix may add; one that takes more is not kept
    memo_entries: int = 4096  # results kept for programs met again; 0: none
    memo_bytes: int = 64 << 20
    pending: int = (
        65536  # programs accepted and not yet finished; `submit` raises SandboxBusy beyond
    )
    recycle_runs: int = 20000  # a worker is replaced after as many programs
    modules: tuple[str, ...] = (  # imported before the first program; missing ones are left out
        "sympy",
        "numpy",
        "scipy",
        "mpmath",
    )
    tier: str = ""  # "T3", "T2", "T1"; "": the strongest this machine allows
    allow_unsafe: bool = False  # accept T1: limits without isolation

    def __post_init__(self) -> None:
        for name in (
            "cpu_seconds",
            "wall_seconds",
            "memory_mb",
            "output_bytes",
            "pending",
            "recycle_runs",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("workers", "snapshots", "snapshot_memory_mb", "memo_entries", "memo_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be below 0")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a program did. `status` is one of STATUSES."""

    status: str
    stdout: str  # exactly what the code printed; the prefix's output is not in it
    stderr_tail: str  # the end of what it wrote to stderr, a traceback included
    cpu_ms: float  # CPU time of prefix and code
    wall_ms: float  # from its start to its end; time in the queue is not in it
    cached: bool = False  # the same program had run before, or was running already


class SandboxError(RuntimeError):
    """The sandbox cannot be started or has failed; the message says what to do."""


class SandboxBusy(RuntimeError):
    """`settings.pending` programs are in flight: take results before submitting more."""


# A job: id, flags (1: more programs with this prefix are expected), length of prefix and of code, both texts.
JOB = struct.Struct("<QBII")
# A result: id, status, start (monotonic), CPU and wall in microseconds, length of stdout and stderr, both.
RESULT = struct.Struct("<QBdQQII")
HEAD = struct.Struct(
    "<cI"
)  # kind of frame and its length: J job, R result, H hello, B goodbye, F failure
SIBLINGS = 1


def frame(kind: bytes, body: bytes) -> bytes:
    return HEAD.pack(kind, len(body)) + body


def pack_job(job: int, flags: int, prefix: bytes, code: bytes) -> bytes:
    size = JOB.size + len(prefix) + len(code)
    return b"".join(
        (HEAD.pack(b"J", size), JOB.pack(job, flags, len(prefix), len(code)), prefix, code)
    )


def unpack_job(body: bytes) -> tuple[int, int, bytes, bytes]:
    """Job id, flags, prefix, code."""
    job, flags, middle, _ = JOB.unpack_from(body)
    start = JOB.size
    return job, flags, body[start : start + middle], body[start + middle :]


def pack_result(
    job: int, status: str, start: float, cpu: float, wall: float, out: bytes, err: bytes
) -> bytes:
    """`start` in monotonic seconds, `cpu` and `wall` in seconds."""
    packed = RESULT.pack(
        job, STATUSES.index(status), start, int(cpu * 1e6), int(wall * 1e6), len(out), len(err)
    )
    return b"".join((HEAD.pack(b"R", len(packed) + len(out) + len(err)), packed, out, err))


def unpack_result(body: bytes) -> tuple[int, float, Result]:
    """Job id, start (monotonic seconds), result. Bytes that are not UTF-8 appear as \\xNN."""
    job, status, start, cpu, wall, out, _ = RESULT.unpack_from(body)
    middle = RESULT.size + out
    return (
        job,
        start,
        Result(
            STATUSES[status],
            body[RESULT.size : middle].decode("utf-8", "backslashreplace"),
            body[middle:].decode("utf-8", "backslashreplace"),
            cpu / 1000,
            wall / 1000,
        ),
    )


def split_frames(buffer: bytearray) -> Iterator[tuple[bytes, bytes]]:
    """Takes whole frames off the front of `buffer`; yields (kind, body)."""
    position = 0
    while len(buffer) - position >= HEAD.size:
        kind, size = HEAD.unpack_from(buffer, position)
        if len(buffer) - position - HEAD.size < size:
            break
        position += HEAD.size
        yield kind, bytes(buffer[position : position + size])
        position += size
    del buffer[:position]
