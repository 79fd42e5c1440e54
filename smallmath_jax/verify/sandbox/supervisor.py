"""The process that owns the workers: hands them programs, replaces those that die, ends with its client.

Started by exec, with an environment, descriptors and signals of its own: nothing of the client is in it, whatever the
client has loaded by then (a device library, threads).
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time

from smallmath_jax.verify.sandbox import linux, protocol

DEPTH = 2  # programs handed to a worker at a time: one runs, one waits beside it
WINDOW = (
    64  # programs looked at, from the front of the queue, for one whose prefix a worker has kept
)
PATIENCE = 0.1  # seconds after which the first in the queue goes to any worker
ATTEMPTS = 2  # workers a program may take down before it is given up
PREFIXES = 4096  # prefixes remembered, with the worker that ran them
START_SECONDS = 180.0

# The interpreter takes nothing from its surroundings: no site packages' start-up code, no user folder, no cwd.
PYTHON = ("-s", "-S", "-P", "-B", "-X", "utf8")
LAUNCH = "import sys; sys.path.insert(0, sys.argv.pop(1)); from smallmath_jax.verify.sandbox.{0} import main; main()"


def command(module: str, root: str, *arguments: str) -> list[str]:
    """The command line of a fresh interpreter that runs a module of this package."""
    return [sys.executable, *PYTHON, "-c", LAUNCH.format(module), root, *arguments]


def environment() -> dict[str, str]:
    """All that a fresh interpreter sees of the environment."""
    fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
             "LD_BIND_NOW": "1",  # or every fork looks up the same names again
             "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}  # fmt: skip
    libraries = os.environ.get("LD_LIBRARY_PATH")
    return {**fixed, **({"LD_LIBRARY_PATH": libraries} if libraries else {})}


@dataclasses.dataclass
class Job:
    id: int
    key: bytes  # of its prefix; b"" for none
    body: bytes  # as packed by `pack_job`
    arrived: float
    attempts: int = 0


@dataclasses.dataclass
class Worker:
    process: subprocess.Popen
    channel: socket.socket
    tier: str
    hello: dict | None = None
    failure: str = ""
    leaving: bool = False  # it has run as many programs as it may
    buffer: bytearray = dataclasses.field(default_factory=bytearray)
    outbox: bytearray = dataclasses.field(default_factory=bytearray)  # what it has no room for yet
    jobs: "collections.deque[Job]" = dataclasses.field(default_factory=collections.deque)
    busy_since: float = 0.0


@dataclasses.dataclass
class State:
    config: dict
    client: socket.socket
    selector: selectors.BaseSelector
    tiers: list[str]  # those still to be tried; the first is in use once a worker has said hello
    failures: list[str]
    workers: list[Worker]
    queue: "collections.deque[Job]"
    homes: "collections.OrderedDict[bytes, Worker | None]"  # prefix -> who ran it last
    shunned: set[bytes]  # prefixes that took a worker down: their programs run whole
    outbox: bytearray
    inbox: bytearray
    ready: bool = False


def main() -> None:
    """Entry point: the client's socket number and the configuration as JSON on the command line."""
    default_signals()
    client = socket.socket(fileno=int(sys.argv[1]))
    config = json.loads(sys.argv[2])
    client.setblocking(False)
    selector = selectors.DefaultSelector()
    selector.register(client, selectors.EVENT_READ, None)
    state = State(config, client, selector, list(config["tiers"]), [], [], collections.deque(),
                  collections.OrderedDict(), set(), bytearray(), bytearray())  # fmt: skip
    _start_worker(state)
    while True:
        events = selector.select(timeout=5.0)
        for key, mask in events:
            if key.data is None:
                if mask & selectors.EVENT_READ:
                    _hear_client(state)
                continue
            if mask & selectors.EVENT_WRITE:
                _send(state, key.data)
            if mask & selectors.EVENT_READ:
                _hear_worker(state, key.data)
        _kill_stuck(state)
        _dispatch(state)
        _flush(state)


def default_signals() -> None:
    """Signals as at a login: what a client ignores or blocks outlives exec, in every process that comes of this one.

    With SIGCHLD ignored no child could be waited for; with SIGXCPU ignored a program would outlive its limit.
    """
    kept = {
        signal.SIGKILL,
        signal.SIGSTOP,
        signal.SIGPIPE,
        signal.SIGXFSZ,
    }  # Python ignores the last two itself
    for number in signal.valid_signals() - kept:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _start_worker(state: State) -> None:
    mine, its = socket.socketpair()
    wanted = {name: state.config[name] for name in ("settings", "packages")}
    wanted["tier"] = state.tiers[0]
    process = subprocess.Popen(
        command("worker", state.config["root"], str(its.fileno()), json.dumps(wanted)),
        pass_fds=(its.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment(),
        cwd="/",
    )
    its.close()
    mine.setblocking(False)
    worker = Worker(process, mine, state.tiers[0], busy_since=time.monotonic())
    state.workers.append(worker)
    state.selector.register(mine, selectors.EVENT_READ, worker)


def _hear_client(state: State) -> None:
    try:
        data = state.client.recv(1 << 20)
    except BlockingIOError:
        return
    except OSError:
        data = b""
    if not data:
        _end(state)
    state.inbox += data
    now = time.monotonic()
    for _, body in protocol.split_frames(state.inbox):
        job, _, prefix, _ = protocol.unpack_job(body)
        key = hashlib.blake2b(prefix, digest_size=16).digest() if prefix else b""
        state.queue.append(Job(job, key, body, now))


def _hear_worker(state: State, worker: Worker) -> None:
    try:
        data = worker.channel.recv(1 << 20)
    except BlockingIOError:
        return
    except OSError:
        data = b""
    if not data:
        _bury(state, worker)
        return
    worker.buffer += data
    for kind, body in protocol.split_frames(worker.buffer):
        if kind == b"R":
            state.outbox += protocol.HEAD.pack(kind, len(body)) + body
            worker.jobs.popleft()
            worker.busy_since = time.monotonic()
        elif kind == b"F":
            worker.failure = body.decode()
        elif kind == b"H":
            worker.hello = json.loads(body)
            _welcome(state)
        elif kind == b"B":
            worker.leaving = True


def _welcome(state: State) -> None:
    """Once a tier has been found, the other workers start; once all are there, the client is told."""
    wanted = state.config["settings"]["workers"]
    while len(state.workers) < wanted:
        _start_worker(state)
    if not state.ready and all(worker.hello for worker in state.workers):
        state.ready = True
        hello = {**state.workers[0].hello, "workers": wanted, "failures": state.failures}
        state.outbox += protocol.frame(b"H", json.dumps(hello).encode())


def _bury(state: State, worker: Worker) -> None:
    """Replaces a dead worker; its programs run elsewhere, but the one that took down two is given up."""
    state.selector.unregister(worker.channel)
    worker.channel.close()
    worker.process.kill()
    status = worker.process.wait()
    state.workers.remove(worker)
    for key in [key for key, home in state.homes.items() if home is worker]:
        state.homes[key] = None
    if worker.hello is None:
        state.failures.append(
            worker.failure or f"{worker.tier}: the worker died ({status}) while starting"
        )
        if (
            not state.ready
            and worker.tier == state.tiers[0]
            and not any(w.hello for w in state.workers)
        ):
            state.tiers.pop(0)
        if not state.tiers or len(state.failures) > 20 + 4 * state.config["settings"]["workers"]:
            state.outbox += protocol.frame(b"F", "; ".join(state.failures[-4:]).encode())
            state.client.settimeout(5.0)  # the client may be sending, and nobody reads any more
            with contextlib.suppress(OSError):
                state.client.sendall(state.outbox)
            _end(state)
    if worker.jobs and not worker.leaving:
        worker.jobs[0].attempts += 1
        state.shunned.add(worker.jobs[0].key)
    for job in reversed(worker.jobs):
        if job.attempts < ATTEMPTS:
            state.queue.appendleft(job)
        else:
            state.outbox += protocol.pack_result(
                job.id, "killed", time.monotonic(), 0.0, 0.0, b"", b"[the program took its worker down]\n"
            )  # fmt: skip
    _start_worker(state)


def _kill_stuck(state: State) -> None:
    """A worker that outlives its own limits by far is ended; `_bury` follows when its socket closes."""
    settings = state.config["settings"]
    now = time.monotonic()
    for worker in state.workers:
        patience = START_SECONDS if worker.hello is None else 3 * settings["wall_seconds"] + 30
        if (worker.jobs or worker.hello is None) and now - worker.busy_since > patience:
            worker.process.kill()


def _dispatch(state: State) -> None:
    for depth in range(1, DEPTH + 1):  # idle workers first
        for worker in state.workers:
            if not state.queue:
                return
            if worker.hello is not None and len(worker.jobs) < depth:
                _hand_over(state, worker, _choose(state, worker))


def _choose(state: State, worker: Worker) -> Job:
    """The first program in the queue, unless another's prefix is at home here or the first one's elsewhere."""
    queue = state.queue
    first = queue[0]
    place = 0
    if first.key and time.monotonic() - first.arrived < PATIENCE:
        homeless = -1
        for index in range(min(WINDOW, len(queue))):
            home = state.homes.get(queue[index].key)
            if home is worker:
                place = index
                break
            if home is None and homeless < 0:
                homeless = index
        else:
            place = max(homeless, 0)
    job = queue[place]
    del queue[place]
    return job


def _hand_over(state: State, worker: Worker, job: Job) -> None:
    body = job.body
    if job.key:
        seen = job.key in state.homes
        state.homes[job.key] = worker
        state.homes.move_to_end(job.key)
        if len(state.homes) > PREFIXES:
            state.homes.popitem(last=False)
        if not seen:
            seen = any(
                other.key == job.key for _, other in zip(range(WINDOW), state.queue, strict=False)
            )
        if seen and job.key not in state.shunned:
            number, _, prefix, code = protocol.JOB.unpack_from(body)
            body = (
                protocol.JOB.pack(number, protocol.SIBLINGS, prefix, code)
                + body[protocol.JOB.size :]
            )
    if not worker.jobs:
        worker.busy_since = time.monotonic()
    worker.jobs.append(job)
    worker.outbox += protocol.frame(b"J", body)
    _send(state, worker)


def _send(state: State, worker: Worker) -> None:
    """As much as there is room for: a busy worker does not read, and may itself wait until its result is read."""
    try:
        while worker.outbox:
            del worker.outbox[: worker.channel.send(worker.outbox)]
    except BlockingIOError:
        pass
    except OSError:
        worker.outbox.clear()
        worker.process.kill()  # `_bury` takes the programs back
    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outbox else 0)
    state.selector.modify(worker.channel, events, worker)


def _flush(state: State) -> None:
    try:
        while state.outbox:
            del state.outbox[: state.client.send(state.outbox)]
    except BlockingIOError:
        pass
    except OSError:
        _end(state)
    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if state.outbox else 0)
    state.selector.modify(state.client, events, None)


def _end(state: State) -> None:
    """The client is gone or has said goodbye: so go all workers."""
    for worker in state.workers:
        worker.process.kill()
    linux.close_from(3)
    os._exit(0)
