"""A worker: process 1 of its own jail, which hands jobs to its forkers, watches the clock and reads the outcome.

It never executes a program and trusts no process that has. Nothing a program writes is parsed: the verdict is its
exit status, seen by `wait4`, and the two memory files it printed to.
"""

import json
import os
import re
import signal
import socket
import sys
import time
from collections import OrderedDict
from typing import Any, NamedTuple

from smallmath_jax.verify.sandbox import filters, heap, jail, linux, programs, protocol, watch

_READY = b"ready"
MORE = "more"  # no verdict: the program wants modules the light forker does not have


class Outcome(NamedTuple):
    status: str
    out: bytes
    err: bytes
    cpu: float  # seconds
    wall: float
    start: float  # monotonic
    peak: int = 0  # kilobytes in memory


class Worker(NamedTuple):
    """What a running worker holds. The dictionaries change, the rest does not."""

    settings: protocol.SandboxSettings
    warm: watch.Forker
    light: (
        watch.Forker | None
    )  # for programs that need the standard library alone: its forks are cheap
    heavy: re.Pattern[bytes]  # what a program for the warm one may be told by
    snapshots: "OrderedDict[bytes, watch.Forker]"
    failed: "OrderedDict[bytes, Outcome | None]"  # prefixes that fail, or (None) cannot be kept
    scratch: str  # "" where programs may write nowhere


def main() -> None:
    """Entry point of a worker process: `channel` number and JSON of what it is to be on the command line."""
    heap.gather()
    channel = socket.socket(fileno=int(sys.argv[1]))
    wanted = json.loads(sys.argv[2])
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    wanted["settings"]["modules"] = tuple(wanted["settings"]["modules"])
    settings = protocol.SandboxSettings(**wanted["settings"])
    try:
        worker, hello = _start(settings, wanted["tier"], wanted["packages"])
        worker = _check(worker, wanted["tier"])
    except (OSError, RuntimeError) as error:
        channel.sendall(protocol.frame(b"F", f"{wanted['tier']}: {error}".encode()))
        os._exit(1)
    channel.sendall(protocol.frame(b"H", json.dumps(hello).encode()))
    _serve(worker, channel)


def _start(
    settings: protocol.SandboxSettings, tier: str, packages: list[str]
) -> tuple[Worker, dict[str, Any]]:
    """Enters the jail and starts the forker. Raises OSError where the machine forbids the tier."""
    folders = jail.library_folders(packages)
    null = os.open("/dev/null", os.O_RDONLY)
    done, scratch = [], ""
    if tier == "T3":
        done += jail.enter_namespaces()
        _become_first()
        places = jail.build_root(folders)
        jail.move_imports(folders, places)
        scratch = "/tmp"
    else:
        places = folders
        os.chdir("/")
    sys.path[:] = places
    if tier != "T1":
        names = dict(zip(places, folders, strict=True))
        done.append(jail.become_nobody(names, settings.modules, must=tier == "T3"))
        if "user" not in done and tier == "T3" and jail.enter_user_namespace():
            done.append("user")
        linux.prctl(linux.PR_SET_DUMPABLE, 1)
        version = jail.restrict_files(places, scratch)
        if version == 0 and tier == "T2":
            raise OSError("this kernel has no Landlock")
        done.append(f"Landlock {version}" if version else "no Landlock")
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    warm, found = _start_forker(settings, tier, null, settings.modules, light=False)
    light = _start_forker(settings, tier, null, (), light=True)[0] if found else None
    if tier != "T1":
        done.append("seccomp allow-list" + (", forks by leave" if warm.listener >= 0 else ""))
    heap.scatter()
    worker = Worker(settings, warm, light, _heavy(found), OrderedDict(), OrderedDict(), scratch)
    return worker, {"tier": tier, "isolation": ", ".join((*done, "limits")), "modules": found}


def _heavy(modules: list[str]) -> re.Pattern[bytes]:
    """Finds what a program mentions that the light forker has not. It need not find all: an import it missed is met
    by `programs.stay_light`. The two words are for programs that look at what is loaded."""
    names = {re.escape(name.partition(".")[0]) for name in modules}
    return re.compile("|".join((*sorted(names), r"\bmodules\b", r"\bgc\b")).encode())


def _become_first() -> None:
    """Continues as process 1 of the new process namespace; this process only waits for it."""
    process = os.fork()
    if process:
        linux.close_from(3)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # a new user namespace has cleared it
        _, status = os.waitpid(process, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)


def _start_forker(
    settings: protocol.SandboxSettings,
    tier: str,
    null: int,
    modules: tuple[str, ...],
    light: bool,
) -> tuple[watch.Forker, list[str]]:
    """An interpreter with these modules warm, and those it found. `light`: there is another that has more."""
    forker, own = watch.open_forker()
    process = os.fork()
    if process == 0:
        try:
            _be_forker(settings, tier, null, own, modules, light)
        except BaseException as error:
            os.write(own[1], repr(error).encode())
        os._exit(1)
    for number in own:
        os.close(number)
    message, numbers, _, _ = socket.recv_fds(forker.control, 65536, 1)
    if not message.startswith(_READY):
        raise OSError(f"the warm interpreter did not start: {message.decode() or 'it died'}")
    forker = forker._replace(
        process=process, listener=numbers[0] if numbers else -1, light=light, stdin=null
    )
    return forker, json.loads(message[len(_READY) :])


def _be_forker(
    settings: protocol.SandboxSettings,
    tier: str,
    null: int,
    own: tuple[int, ...],
    modules: tuple[str, ...],
    light: bool,
) -> None:
    os.environ.clear()
    home = "/tmp" if tier == "T3" else "/"
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.environ.update({"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", **threads})
    targets = (programs.JOB, programs.CONTROL, programs.SINK, programs.OUT, programs.GO, 2)
    watch.place_descriptors((*own, own[3], null), (*targets, 1, 0))
    control = socket.socket(fileno=programs.CONTROL)
    found = programs.warm(modules)
    if light:
        programs.stay_light()
    programs.settle()
    programs.limit(settings.memory_mb << 20, settings.output_bytes)
    die_with_parent = lambda: linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    each = (
        die_with_parent if tier != "T3" else lambda: None
    )  # in T3 the process namespace sees to it
    sent = []
    if tier != "T1":
        jail.restrict_signals()
        try:
            sent = [filters.install(filters.program(True, writing=tier == "T3"), listener=True)]
        except (
            OSError
        ):  # before Linux 5.5, or another listener above us: every fork takes the filter itself
            instructions = filters.program(False, writing=tier == "T3")
            first = each
            each = lambda: (first(), filters.install(instructions))
    socket.send_fds(control, [_READY + json.dumps(found).encode()], sent)
    control.detach()
    linux.close_from(programs.GO + 1)
    linux.close_from(3, programs.JOB - 1)
    programs.serve(None, each)


def _serve(worker: Worker, channel: socket.socket) -> None:
    """Runs jobs one after the other until the supervisor goes away or it is time to be replaced."""
    buffer, left = bytearray(), worker.settings.recycle_runs
    while left > 0:
        data = channel.recv(1 << 16)
        if not data:
            os._exit(0)
        buffer += data
        for _, body in protocol.split_frames(buffer):
            job, flags, prefix, code = protocol.unpack_job(body)
            outcome = run_job(worker, prefix, code, bool(flags & protocol.SIBLINGS))
            channel.sendall(
                protocol.pack_result(
                    job,
                    outcome.status,
                    outcome.start,
                    outcome.cpu,
                    outcome.wall,
                    outcome.out,
                    outcome.err,
                )
            )
            left = left - 1 if _emptied(worker) else 0
            if left == 0:
                break  # the supervisor has the rest run elsewhere
    channel.sendall(protocol.frame(b"B", b""))
    os._exit(0)


def run_job(worker: Worker, prefix: bytes, code: bytes, siblings: bool) -> Outcome:
    """One program: in the light forker where that will do."""
    light = worker.light
    if light is not None and not (worker.heavy.search(prefix) or worker.heavy.search(code)):
        outcome = _run_under(worker, light, prefix, code, siblings)
        if outcome.status != MORE:
            return outcome
        _empty(worker)
    return _run_under(worker, worker.warm, prefix, code, siblings)


def _run_under(
    worker: Worker, forker: watch.Forker, prefix: bytes, code: bytes, siblings: bool
) -> Outcome:
    """One program. Its prefix is kept executed when `siblings` are expected and nothing speaks against it."""
    start = time.monotonic()
    if prefix and siblings and forker.listener >= 0 and worker.settings.snapshots:
        kept = _kept_prefix(worker, forker, prefix)
        if isinstance(kept, Outcome):
            return kept._replace(start=start)
        if kept is not None:
            outcome = _run_sibling(worker, kept, prefix, code)
            if outcome is not None:
                return outcome
        _empty(worker)
    return _run_whole(worker, forker, prefix, code)


def _run_whole(worker: Worker, forker: watch.Forker, prefix: bytes, code: bytes) -> Outcome:
    """A program from its first line."""
    settings = worker.settings
    watch.write_job(forker, prefix, code)
    start = time.monotonic()
    process, _ = watch.order(forker, programs.RUN)
    if process <= 0:
        raise SystemExit("a forker is gone")  # the supervisor starts another worker
    watch.set_limits(process, settings.cpu_seconds)
    limits = settings.cpu_seconds, settings.wall_seconds
    end = watch.wait(process, forker.listener, start, *limits)
    outcome = _outcome(worker, forker, end, start)
    watch.reset(forker, sink=bool(prefix))
    return outcome


def _run_sibling(worker: Worker, kept: watch.Forker, prefix: bytes, code: bytes) -> Outcome | None:
    """Code in a fork of the process that has executed its prefix; None where that cannot be had."""
    settings = worker.settings
    os.kill(kept.process, signal.SIGCONT)
    process, forked = watch.order(kept, programs.RUN)
    os.kill(kept.process, signal.SIGSTOP)
    forkers = (worker.warm, *([worker.light] if worker.light else []), *worker.snapshots.values())
    if process in {forker.process for forker in forkers} or not watch.is_child(process):
        # The prefix has spoilt the process it ran in: its programs run whole from now on.
        if forked:
            raise SystemExit("a kept prefix hides the process it made")  # all of this jail goes
        _forget(worker, kept, prefix)
        return None
    start = time.monotonic()
    watch.set_limits(process, settings.cpu_seconds)
    watch.write_job(kept, b"", code)
    os.write(kept.go, b"g")
    limits = settings.cpu_seconds - kept.cpu, settings.wall_seconds
    end = watch.wait(process, kept.listener, start, *limits)
    outcome = _outcome(worker, kept, end, start)
    watch.reset(kept, sink=True)
    if watch.has_grown(kept, settings.snapshot_memory_mb << 10):
        _forget(worker, kept, prefix)
    if os.WIFEXITED(end.status) and os.WEXITSTATUS(end.status) == programs.NOT_A_UNIT:
        return None
    return outcome._replace(cpu=outcome.cpu + kept.cpu, wall=outcome.wall + kept.wall)


def _forget(worker: Worker, kept: watch.Forker, prefix: bytes) -> None:
    """A kept prefix goes, and is not kept again."""
    key = _key(kept.light, prefix)
    watch.discard(worker.snapshots.pop(key))
    worker.failed[key] = None


def _key(light: bool, prefix: bytes) -> bytes:
    import hashlib  # not before the forkers have started: it maps libcrypto, and each fork would copy that

    return hashlib.blake2b(prefix, digest_size=32, person=b"light" if light else b"warm").digest()


def _kept_prefix(
    worker: Worker, under: watch.Forker, prefix: bytes
) -> watch.Forker | Outcome | None:
    """The process that has executed this prefix; the outcome where it fails; None where it cannot be kept."""
    key = _key(under.light, prefix)
    if key in worker.snapshots:
        worker.snapshots.move_to_end(key)
        return worker.snapshots[key]
    if key in worker.failed:
        worker.failed.move_to_end(key)
        return worker.failed[key]
    kept = _keep(worker, under, prefix)
    if isinstance(kept, watch.Forker):
        worker.snapshots[key] = kept
        if len(worker.snapshots) > worker.settings.snapshots:
            watch.discard(worker.snapshots.popitem(last=False)[1])
        return kept
    worker.failed[key] = kept
    if len(worker.failed) > 256:
        worker.failed.popitem(last=False)
    return kept


def _keep(worker: Worker, under: watch.Forker, prefix: bytes) -> watch.Forker | Outcome | None:
    """Executes a prefix in a process that stays. What failed for the lack of memory is left to a whole run."""
    settings = worker.settings
    forker, own = watch.open_forker()
    watch.write_job(forker, prefix, b"")
    process, _ = watch.order(under, programs.KEEP, own)
    for number in own:
        os.close(number)
    if process <= 0:
        raise SystemExit("a forker is gone")
    start = time.monotonic()
    watch.set_snapshot_limits(process, settings.cpu_seconds)
    # All but the files they print to is as with the one it was forked from.
    forker = under._replace(
        **{name: getattr(forker, name) for name in ("control", "job", "sink", "out", "err", "go")},
        process=process,
    )
    limits = settings.cpu_seconds, settings.wall_seconds
    end = watch.wait(process, under.listener, start, *limits, told=forker.control)
    if end.reason == "told" and forker.control.recv(4) == b"kept":
        peak = watch.stop(process)
        small = 0 <= peak <= under.peak + (settings.snapshot_memory_mb << 10)
        clean = not worker.scratch or watch.untouched(worker.scratch)
        if small and clean and not watch.holds_files(process):
            watch.reset(forker, sink=True)
            return forker._replace(cpu=end.cpu, wall=end.wall)
        outcome = None
    elif end.reason == "told":
        outcome = None
    else:
        outcome = _outcome(worker, forker, end, start)._replace(out=b"")
        unsure = (programs.NOT_A_UNIT, programs.OUT_OF_MEMORY)
        doubtful = os.WIFEXITED(end.status) and os.WEXITSTATUS(end.status) in unsure
        if doubtful or outcome.status not in (*protocol.REPEATABLE, MORE):
            outcome = None
    watch.discard(forker)
    return outcome


def _outcome(worker: Worker, forker: watch.Forker, end: watch.End, start: float) -> Outcome:
    """The verdict: from the exit status, the clock and the sizes of what was printed."""
    settings = worker.settings
    out, too_much_out = watch.printed(forker.out, settings.output_bytes)
    err, too_much_err = watch.printed(forker.err, settings.output_bytes, settings.stderr_tail)
    ended = os.WTERMSIG(end.status) if os.WIFSIGNALED(end.status) else 0
    if end.reason != "exited":
        status = end.reason
    elif ended == signal.SIGXCPU:
        status = "timeout_cpu"
    elif too_much_out or too_much_err or ended == signal.SIGXFSZ:
        status = "output_cap"
    elif ended == signal.SIGKILL:
        status = "timeout_cpu" if end.cpu >= settings.cpu_seconds else "killed"
    elif ended:
        status = "error"
        err += f"[the program was ended by {signal.Signals(ended).name}]\n".encode()
    elif end.status == 0:
        status = "ok"
    else:
        told = os.WEXITSTATUS(end.status)
        more = forker.light and told == programs.ASKS_FOR_MORE
        status = MORE if more else "out_of_memory" if told == programs.OUT_OF_MEMORY else "error"
    return Outcome(status, out, err, end.cpu, end.wall, start, end.peak)


def _emptied(worker: Worker) -> bool:
    """Whether the scratch folder could be emptied: nothing of a program is left for the next one."""
    return not worker.scratch or watch.empty_folder(worker.scratch)


def _empty(worker: Worker) -> None:
    if not _emptied(worker):
        raise SystemExit("the scratch folder cannot be emptied")


_PROBE = b"""
import os, socket
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return True
    return False
tried = {
    "sockets": (socket.socket,), "processes": (os.fork,), "signals": (os.kill, 1, 0), "/proc": (os.listdir, "/proc"),
    "files of the host": (open, "/etc/hosts"), "writing outside /tmp": (open, "/x", "w"),
}
print(",".join(name for name, action in tried.items() if not refused(*action)), end="")
"""


def _check(worker: Worker, tier: str) -> Worker:
    """Tries what must not work before any program may, and takes the measure of a program that does nothing. Raises
    RuntimeError naming what did work."""
    probed = []
    for forker in (worker.warm, *([worker.light] if worker.light else [])):
        outcome = _run_whole(worker, forker, b"", _PROBE if tier != "T1" else b"")
        if outcome.status != "ok" or outcome.out:
            told = outcome.out.decode() or outcome.err.decode()
            raise RuntimeError(f"the isolation does not hold: {outcome.status}, {told}")
        probed.append(forker._replace(peak=outcome.peak))
    _empty(worker)
    return worker._replace(warm=probed[0], light=probed[1] if worker.light else None)
