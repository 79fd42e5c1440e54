"""The sandbox as its user holds it: submit programs, take results. No threads; an asyncio loop may wait on it."""

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

from smallmath_jax.verify.sandbox import protocol
from smallmath_jax.verify.sandbox.protocol import Result, SandboxBusy, SandboxError, SandboxSettings
from smallmath_jax.verify.sandbox.supervisor import command, environment

_DEFAULTS = SandboxSettings()
RESTARTS = 3  # in a row without a result: then the sandbox is given up
_RECENT = 4096  # programs the percentiles of `counters` are taken over


@dataclasses.dataclass
class _Flight:
    """A program on its way: who waits for it."""

    key: bytes
    prefix: bytes
    code: bytes
    submitted: float
    waiting: list[Callable[[Result], None]]


class Sandbox:
    """Runs model-written programs, each in a process of its own behind the strongest isolation the machine allows.

    Started by `start_sandbox`. `tier` is T3 (namespaces, Landlock, seccomp, limits), T2 (no namespaces) or T1
    (limits only); `isolation` says what is on, word by word; `modules` are those that are imported already.
    """

    def __init__(self, settings: SandboxSettings):
        self.settings = settings
        self.tier = self.isolation = ""
        self.modules: tuple[str, ...] = ()
        self.weaker: tuple[str, ...] = ()  # why stronger tiers were not to be had
        self._flights: dict[int, _Flight] = {}
        self._by_key: dict[bytes, int] = {}
        self._memo: collections.OrderedDict[bytes, Result] = collections.OrderedDict()
        self._memo_size = 0
        self._next = 0
        self._finished: collections.deque[tuple[int, Result]] = collections.deque()
        self._inbox, self._outbox = bytearray(), bytearray()
        self._counts: collections.Counter[str] = collections.Counter()
        self._queue_ms: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._cpu_ms: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._restarts = 0
        self._room: collections.deque[asyncio.Future] = collections.deque()
        self._awaited: set[asyncio.Future] = set()
        self._sending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._start()

    # -- running programs

    def run_many(self, programs: Sequence[tuple[str, str]]) -> list[Result]:
        """Runs (prefix, code) pairs; results in their order. Waits for them.

        The prefix is executed before the code, in the same namespace; programs with the same prefix share its
        execution, and the same program runs once. Raises SandboxError when the sandbox is closed or cannot go on.
        """
        results: dict[int, Result] = {}
        for index, (prefix, code) in enumerate(programs):
            while len(self._flights) >= self.settings.pending:
                self._wait(1.0)
            self._add(prefix, code, lambda result, place=index: results.__setitem__(place, result))
            if len(self._outbox) > 1 << 18:
                self._send()
                self._wait(0.0)
        while len(results) < len(programs):
            self._wait(1.0)
        return [results[index] for index in range(len(programs))]

    def submit(self, prefix: str, code: str) -> int:
        """Starts one program and returns its ticket. Raises SandboxBusy when `settings.pending` are in flight."""
        if len(self._flights) >= self.settings.pending:
            raise SandboxBusy(
                f"{len(self._flights)} programs are in flight; take results with poll() before submitting more"
            )
        ticket = self._next
        self._add(prefix, code, lambda result: self._finished.append((ticket, result)))
        self._send()
        return ticket

    def poll(self, seconds: float = 0.0) -> list[tuple[int, Result]]:
        """Finished (ticket, result) pairs of `submit`; waits up to `seconds` for the first one."""
        until = time.monotonic() + seconds
        self._wait(0.0)
        while not self._finished and self._flights and (left := until - time.monotonic()) > 0:
            self._wait(left)
        taken = list(self._finished)
        self._finished.clear()
        return taken

    async def run(self, prefix: str, code: str) -> Result:
        """Runs one program on an asyncio loop; thousands may be awaited at once.

        Waits for room while `settings.pending` are in flight. Raises SandboxError as `run_many` does.
        """
        loop = asyncio.get_running_loop()
        self._listen(loop)
        while len(self._flights) >= self.settings.pending:
            self._send()
            room = loop.create_future()
            self._room.append(room)
            try:
                await room
            except asyncio.CancelledError:
                self._wake()  # it may have been its turn
                raise
        done: asyncio.Future[Result] = loop.create_future()
        self._add(prefix, code, lambda result: done.done() or done.set_result(result))
        self._wake()  # a program that is known takes no room
        if done.done():
            return done.result()
        if not self._sending:  # once for all that is added in this turn of the loop
            self._sending = True
            loop.call_soon(self._send_soon)
        self._awaited.add(done)
        try:
            return await done
        finally:
            self._awaited.discard(done)

    def fileno(self) -> int:
        """A descriptor that is readable when results may be taken with `poll`."""
        return self._channel.fileno()

    @property
    def in_flight(self) -> int:
        """Programs accepted and not finished, counting the same program once."""
        return len(self._flights)

    def counters(self) -> dict[str, float]:
        """Totals since the start; percentiles over the last few thousand programs that were run."""
        counts: dict[str, float] = {"in_flight": len(self._flights)}
        for name in ("executed", "cached", "restarts", *protocol.STATUSES):
            counts[name] = self._counts[name]
        for name, values in (("queue_ms", self._queue_ms), ("cpu_ms", self._cpu_ms)):
            ordered = sorted(values)
            for percent in (50, 99):
                place = min(len(ordered) * percent // 100, len(ordered) - 1)
                counts[f"{name}_p{percent}"] = ordered[place] if ordered else 0.0
        return counts

    def close(self) -> None:
        """Ends every process of the sandbox; what is in flight is lost."""
        if self._process is not None:
            self._stop()
            self._flights.clear()
            self._by_key.clear()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- programs on their way

    def _add(self, prefix: str, code: str, take: Callable[[Result], None]) -> None:
        if self._process is None:
            raise SandboxError("the sandbox is closed; start another with start_sandbox")
        ticket, self._next = self._next, self._next + 1
        refused = self._refusal(prefix, code)
        if refused:
            self._counts["rejected"] += 1
            take(Result("rejected", "", refused, 0.0, 0.0))
            return
        texts = prefix.encode(), code.encode()
        key = hashlib.blake2b(len(texts[0]).to_bytes(8, "little") + texts[0] + texts[1]).digest()
        known = self._memo.get(key)
        if known is not None:
            self._memo.move_to_end(key)
            self._counts["cached"] += 1
            take(known)
            return
        if self.settings.memo_entries and key in self._by_key:
            self._counts["cached"] += 1
            again = lambda result: take(dataclasses.replace(result, cached=True))
            self._flights[self._by_key[key]].waiting.append(again)
            return
        self._flights[ticket] = _Flight(key, *texts, time.monotonic(), [take])
        self._by_key[key] = ticket
        self._outbox += protocol.pack_job(ticket, 0, *texts)

    def _refusal(self, prefix: str, code: str) -> str:
        limit = self.settings.program_bytes
        try:
            size = len(prefix.encode()) + len(code.encode())
        except UnicodeEncodeError:
            return "the program is not text: it holds half a surrogate pair"
        return f"the program has {size} bytes, the limit is {limit}" if size > limit else ""

    def _take(self, ticket: int, start: float, result: Result) -> None:
        flight = self._flights.pop(ticket, None)
        if flight is None:
            return
        if self._by_key.get(flight.key) == ticket:
            del self._by_key[flight.key]
        self._restarts = 0
        self._counts["executed"] += 1
        self._counts[result.status] += 1
        self._queue_ms.append(max(start - flight.submitted, 0.0) * 1000)
        self._cpu_ms.append(result.cpu_ms)
        if result.status in protocol.REPEATABLE:
            self._remember(flight.key, dataclasses.replace(result, cached=True))
        for take in flight.waiting:
            take(result)
        self._wake()

    def _wake(self) -> None:
        """As many of those who wait for room as there is room for."""
        free = self.settings.pending - len(self._flights)
        while free > 0 and self._room:
            room = self._room.popleft()
            if not room.done():  # those who were cancelled are still in line
                room.set_result(None)
                free -= 1

    def _remember(self, key: bytes, result: Result) -> None:
        self._memo[key] = result
        self._memo_size += len(result.stdout) + len(result.stderr_tail)
        settings = self.settings
        while self._memo and (
            len(self._memo) > settings.memo_entries or self._memo_size > settings.memo_bytes
        ):
            _, old = self._memo.popitem(last=False)
            self._memo_size -= len(old.stdout) + len(old.stderr_tail)

    # -- the supervisor

    def _start(self) -> None:
        settings = dataclasses.replace(
            self.settings, workers=self.settings.workers or len(os.sched_getaffinity(0))
        )
        config = {
            "settings": dataclasses.asdict(settings),
            "packages": _package_folders(settings.modules),
            "root": os.path.dirname(_folder(__file__, 3)),
            "tiers": _tiers(settings),
        }
        self._channel, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                command("supervisor", config["root"], str(its.fileno()), json.dumps(config)),
                pass_fds=(its.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment(),
                cwd="/",
                start_new_session=True,
            )
        self._inbox.clear()
        self._hear_hello()

    def _hear_hello(self) -> None:
        while True:
            data = self._channel.recv(1 << 16)
            self._inbox += data
            for kind, body in protocol.split_frames(self._inbox):
                if kind == b"H":
                    hello = json.loads(body)
                    self.tier, self.isolation = hello["tier"], hello["isolation"]
                    self.modules, self.weaker = tuple(hello["modules"]), tuple(hello["failures"])
                    return
                self._stop()
                raise SandboxError(_no_sandbox(self.settings, body.decode()))
            if not data:
                self._stop()
                raise SandboxError(_no_sandbox(self.settings, "the supervisor died while starting"))

    def _stop(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(Exception):
                self._loop.remove_reader(self._channel.fileno())
            self._loop = None
        self._channel.close()  # the supervisor ends when it reads the end, and all workers with it
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _restart(self) -> None:
        """After the supervisor's death: another one, and what was in flight runs again."""
        self._restarts += 1
        self._counts["restarts"] += 1
        loop = self._loop
        self._stop()
        if self._restarts > RESTARTS:
            self._give_up(f"the supervisor died {self._restarts} times in a row without a result")
        try:
            self._start()
        except (SandboxError, OSError) as error:
            if self._process is not None:
                self._stop()
            self._channel.close()
            self._give_up(f"the supervisor died and cannot be replaced: {error}")
        self._outbox.clear()
        for ticket, flight in self._flights.items():
            self._outbox += protocol.pack_job(ticket, 0, flight.prefix, flight.code)
        if loop is not None:
            self._listen(loop)
        self._send()

    def _give_up(self, reason: str) -> None:
        for waiter in (*self._awaited, *self._room):
            waiter.done() or waiter.set_exception(SandboxError(reason))
        self._room.clear()
        raise SandboxError(reason)

    def _send_soon(self) -> None:
        self._sending = False
        with contextlib.suppress(SandboxError):  # those who wait have been told
            self._send()

    def _hear_soon(self) -> None:
        with contextlib.suppress(SandboxError):  # those who wait have been told
            self._hear()

    def _send(self) -> None:
        if self._outbox and self._process is not None:
            try:
                self._channel.sendall(self._outbox)  # the supervisor always reads
            except OSError:
                self._restart()
                return
            self._outbox.clear()

    def _wait(self, seconds: float) -> None:
        """Sends what is to be sent and takes in what has come; waits up to `seconds` for something to come."""
        if self._process is None:
            raise SandboxError("the sandbox is closed; start another with start_sandbox")
        self._send()
        ready, _, _ = select.select([self._channel], [], [], seconds)
        if ready:
            self._hear()

    def _hear(self) -> None:
        try:
            data = self._channel.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._restart()
            return
        self._inbox += data
        for kind, body in protocol.split_frames(self._inbox):
            if kind == b"R":
                self._take(*protocol.unpack_result(body))
            elif kind == b"F":
                self._stop()
                self._give_up(f"the sandbox has failed: {body.decode()}")

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._process is None:
            raise SandboxError("the sandbox is closed; start another with start_sandbox")
        if self._loop is not loop:
            self._loop = loop
            loop.add_reader(self._channel.fileno(), self._hear_soon)


@contextlib.contextmanager
def start_sandbox(settings: SandboxSettings = _DEFAULTS) -> Iterator[Sandbox]:
    """Starts the sandbox, to be used in a `with`; before or after jax is imported makes no difference to it.

    Raises SandboxError when no isolation is to be had (containers may forbid it) and `allow_unsafe` is not set.
    """
    with Sandbox(settings) as sandbox:
        yield sandbox


def _tiers(settings: SandboxSettings) -> list[str]:
    known = ["T3", "T2", "T1"]
    if settings.tier and settings.tier not in known:
        raise SandboxError(f"no tier {settings.tier!r}; known: {', '.join(known)}")
    tiers = [settings.tier] if settings.tier else known
    if not settings.allow_unsafe and "T1" in tiers:
        tiers.remove("T1")
        if not tiers:
            raise SandboxError(
                "tier T1 does not isolate; set allow_unsafe=True to run programs all the same"
            )
    return tiers


def _no_sandbox(settings: SandboxSettings, reasons: str) -> str:
    return (
        f"no sandbox: {reasons}. Allow user namespaces or Landlock and seccomp on this machine (in a container: its "
        "security profile), or, for programs you trust, set allow_unsafe=True"
    )


def _folder(path: str, up: int) -> str:
    for _ in range(up):
        path = os.path.dirname(path)
    return os.path.abspath(path)


def _package_folders(modules: Sequence[str]) -> list[str]:
    """The folders the modules lie in, without importing them."""
    found = []
    for name in modules:
        spec = importlib.util.find_spec(name.partition(".")[0])
        if spec is not None and spec.origin:
            folder = _folder(spec.origin, 2 if spec.submodule_search_locations else 1)
            if folder not in found:
                found.append(folder)
    return found
