"""Processes seen from their parent: ordering a fork, deciding who may fork, waiting under limits, reading what was
printed. Runs in process 1 of a jail, which may only trust what the kernel tells it."""

import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

from smallmath_jax.verify.sandbox import linux, programs

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_CONTINUE = 1
_REPORT_SECONDS = 5.0  # for a forker to say which process it made
FORKS_ASKED = 100  # refusals after which a program that keeps asking for another process is ended


class Forker(NamedTuple):
    """A process that forks when ordered to, and the files it shares with its parent."""

    process: int
    control: socket.socket
    job: int
    sink: int
    out: int
    err: int
    go: int
    listener: int = -1  # asks leave for its forks; -1: they need none
    light: bool = False  # it holds the standard library alone
    stdin: int = -1  # the one open file all its programs have there; not its own
    peak: int = 0  # kilobytes a program of it that does nothing has in memory
    cpu: float = 0.0  # seconds its prefix took
    wall: float = 0.0


class End(NamedTuple):
    """How a process ended, or that it said what was waited for (`reason` "told")."""

    reason: str  # exited | timeout_cpu | timeout_wall | killed (it kept asking to fork) | told
    status: int  # as from wait4
    cpu: float  # seconds
    wall: float
    peak: int = 0  # kilobytes it had in memory at most


def open_forker() -> tuple[Forker, tuple[int, ...]]:
    """The parent's side, process unknown yet, and the forker's descriptors in the order of `programs`' numbers."""
    files = [os.memfd_create(name) for name in ("job", "sink", "out", "err")]
    mine, its = socket.socketpair()
    read, write = os.pipe()
    job, sink, out, err = (os.dup(number) for number in files)
    forker = Forker(0, mine, files[0], files[1], files[2], files[3], write)
    return forker, (job, its.detach(), sink, out, read, err)


def place_descriptors(sources: Sequence[int], targets: Sequence[int]) -> None:
    """Moves descriptors to fixed numbers, whatever numbers they have now."""
    high = [fcntl.fcntl(source, fcntl.F_DUPFD, 64) for source in sources]
    for number, target in zip(high, targets, strict=True):
        os.dup2(number, target)


def discard(forker: Forker) -> None:
    """Ends a forker and frees what it held."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(forker.process, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(forker.process, 0)
    forker.control.close()
    for number in (forker.job, forker.sink, forker.out, forker.err, forker.go):
        os.close(number)


def write_job(forker: Forker, prefix: bytes, code: bytes) -> None:
    os.ftruncate(forker.job, 0)
    header = programs.LENGTHS.pack(len(prefix), len(code))
    os.pwrite(forker.job, b"".join((header, prefix, code)), 0)


def reset(forker: Forker, sink: bool) -> None:
    """Empties what was printed to, and undoes what a program may have set on the shared file descriptions."""
    for number in (forker.out, forker.err, forker.sink) if sink else (forker.out, forker.err):
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)
        fcntl.fcntl(number, fcntl.F_SETFL, 0)
    fcntl.fcntl(forker.stdin, fcntl.F_SETFL, 0)
    fcntl.flock(forker.stdin, fcntl.LOCK_UN)


def printed(number: int, cap: int, tail: int = 0) -> tuple[bytes, bool]:
    """A memory file's first `cap` bytes (the last `tail` of them), and whether there were more."""
    size = os.fstat(number).st_size
    kept = min(size, cap)
    start = max(0, kept - tail) if tail else 0
    return os.pread(number, kept - start, start), size > cap


def order(forker: Forker, kind: bytes, own: Sequence[int] = ()) -> tuple[int, bool]:
    """Has a forker fork. Returns the child's process id (0 when it gave none) and whether it was let fork at all."""
    try:
        forker.control.send(kind)
        if own:
            socket.send_fds(forker.control, [b"f"], list(own))
    except OSError:
        return 0, False
    return _reported(forker, forker.listener)


def _reported(forker: Forker, listener: int) -> tuple[int, bool]:
    """Grants one fork to the forker and hears the child's id from it."""
    poll = select.poll()
    poll.register(forker.control.fileno(), select.POLLIN)
    if listener >= 0:
        poll.register(listener, select.POLLIN)
    granted = listener < 0
    until = time.monotonic() + _REPORT_SECONDS
    while (left := until - time.monotonic()) > 0:
        ready = [number for number, _ in poll.poll(left * 1000 + 1)]
        if listener in ready:
            granted |= answer(listener, 0 if granted else forker.process)
        if forker.control.fileno() in ready:
            try:
                data = forker.control.recv(4)
            except OSError:
                data = b""  # it died
            return (struct.unpack("<i", data)[0] if len(data) == 4 else 0), granted
    return 0, granted


def answer(listener: int, allowed: int) -> bool:
    """Answers the process that asks to fork: yes when it is `allowed` and asks for a plain fork. True for yes."""
    asked = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, asked)
    except OSError:
        return False  # it died while asking
    token, process, _, call = struct.unpack_from("<QIIi", asked)
    flags, stack = struct.unpack_from("<QQ", asked, 32)
    yes = process == allowed and (call, flags, stack) == (linux.number("clone"), linux.FORK, 0)
    reply = struct.pack("<QqiI", token, 0, 0 if yes else -1, _CONTINUE if yes else 0)
    with contextlib.suppress(OSError):
        fcntl.ioctl(listener, _SEND, reply)
    return yes


def is_child(process: int) -> bool:
    """Whether it is a child of this process, by the kernel's word."""
    try:
        if process > 0:
            os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (OSError, OverflowError):
        return False
    return process > 0


def set_limits(process: int, cpu_seconds: float) -> None:
    """The kernel's own CPU limit, a second above the one that is watched; and no forks."""
    seconds = int(cpu_seconds) + 2
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process, resource.RLIMIT_CPU, (seconds, seconds))
        resource.prlimit(process, resource.RLIMIT_NPROC, (0, 0))


def set_snapshot_limits(process: int, cpu_seconds: float) -> None:
    """The CPU limit of a prefix that is to stay: its forks add to its CPU time."""
    seconds = int(cpu_seconds) + 10
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process, resource.RLIMIT_CPU, (seconds, seconds))


def stop(process: int) -> int:
    """Puts a child to sleep. Returns the kilobytes it had in memory at most, or -1 where it has ended."""
    os.kill(process, signal.SIGSTOP)
    _, status, usage = os.wait4(process, os.WUNTRACED)
    return usage.ru_maxrss if os.WIFSTOPPED(status) else -1


def has_grown(kept: Forker, kilobytes: int) -> bool:
    """Whether a kept prefix has taken more memory since it was stopped last than this, or has ended."""
    found, status, usage = os.wait4(kept.process, os.WUNTRACED | os.WNOHANG)
    return bool(found) and not (os.WIFSTOPPED(status) and usage.ru_maxrss - kept.peak <= kilobytes)


def wait(
    process: int,
    listener: int,
    start: float,
    cpu_limit: float,
    wall_limit: float,
    told: socket.socket | None = None,
) -> End:
    """Waits for a child under limits (seconds), the wall clock's from `start` (monotonic), and kills it when it passes
    one; or until it writes to `told`."""
    handle = os.pidfd_open(process)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    if listener >= 0:
        poll.register(listener, select.POLLIN)
    if told is not None:
        poll.register(told.fileno(), select.POLLIN)
    used, asked, reason = 0.0, 0, "exited"
    while True:
        # One thread: it cannot use up the rest of its CPU time before so much time has passed.
        wall = time.monotonic() - start
        left = max(min(cpu_limit - used, wall_limit - wall), 0)
        ready = [number for number, _ in poll.poll(left * 1000 + 1)]
        if handle in ready:
            break
        if listener in ready:
            answer(listener, 0)
            asked += 1
            if asked > FORKS_ASKED:
                reason = "killed"
                break
        if told is not None and told.fileno() in ready:
            if _says_something(told):
                reason = "told"
                break
            poll.unregister(told.fileno())  # it is ending
            told = None
        used, wall = cpu_time(process), time.monotonic() - start
        if used >= cpu_limit or wall >= wall_limit:
            reason = "timeout_cpu" if used >= cpu_limit else "timeout_wall"
            break
    os.close(handle)
    if reason == "told":
        return End(reason, 0, cpu_time(process), time.monotonic() - start)
    if reason != "exited":
        os.kill(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    wall = time.monotonic() - start
    return End(reason, status, usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss)


def _says_something(channel: socket.socket) -> bool:
    try:
        return bool(channel.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def cpu_time(process: int) -> float:
    """CPU seconds a process has used, by its own clock; 0 when it is gone."""
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:
        return 0.0


def holds_files(process: int) -> bool:
    """Whether a forker has descriptors open that it was not given: a prefix that left files open."""
    given = {0, 1, 2, programs.JOB, programs.CONTROL, programs.SINK, programs.OUT, programs.GO}
    handle = os.pidfd_open(process)
    found = False
    for number in range(programs.OPEN_FILES):
        if number in given or found:
            continue
        try:
            os.close(linux.call("pidfd_getfd", handle, number, 0))
            found = True
        except OSError as error:
            found = (
                error.errno != 9
            )  # EBADF is what is hoped for; not being allowed to look counts as found
    os.close(handle)
    return found


def untouched(folder: str) -> bool:
    """Whether a folder is as `empty_folder` leaves it, times apart."""
    return stat.S_IMODE(os.stat(folder).st_mode) == 0o700 and not os.listdir(folder)


def empty_folder(folder: str) -> bool:
    """Deletes what lies in a folder, however deep and whatever its permissions; False where that fails.

    Without recursion and without long paths: folders are entered one by one. Nothing is renamed: the first Landlock
    forbids that. There are no links (the filter sees to it).
    """
    try:
        os.chmod(folder, 0o700)
        if names := os.listdir(folder):
            with contextlib.chdir(folder):
                _delete(names)
        os.utime(folder, ns=(0, 0))  # they would tell what has been done here, or what was set
    except OSError:
        return False
    return True


def _delete(names: list[str]) -> None:
    """Deletes these files and folders of the current folder."""
    # Folders that are being emptied, the outermost first, and what is still to be deleted beside each.
    entered: list[tuple[str, list[str]]] = []
    while names or entered:
        if not names:
            name, names = entered.pop()
            os.chdir("..")
            os.rmdir(name)
            continue
        name = names.pop()
        if not stat.S_ISDIR(os.lstat(name).st_mode):
            os.unlink(name)
            continue
        os.chmod(name, 0o700)
        entered.append((name, names))
        os.chdir(name)
        names = os.listdir(".")
