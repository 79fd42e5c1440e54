"""What surrounds the steps: metrics as immutable parts and TensorBoard events, the progress line, the stop signal."""

import json
import math
import signal
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from smallmath_jax.parallel import hosts
from smallmath_jax.records import write_part
from smallmath_jax.train.events import drop_events, write_events

LOG_FOLDERS = ("metrics", "completions")  # what holds parts named STEP-hostH.jsonl
PART_STEPS = 50
PART_SECONDS = 60.0
EXCHANGE_SECONDS = (
    10.0  # between two looks of hosts at one another: less than a preempted one is given
)


class MetricWriter:
    """One JSON object a step in `metrics/STEP-hostH.jsonl` (STEP: the part's last), and TensorBoard events of host 0.

    A part is published after 50 steps, after a minute, and at `flush`, which must come before a checkpoint is saved:
    then a kill can lose log lines only of steps that will be run again (law 6).
    """

    def __init__(self, workdir: str | epath.Path, host: int = 0):
        self.workdir = epath.Path(workdir)
        self.host = host
        self._rows: list[dict[str, Any]] = []
        self._times: list[float] = []
        self._published = time.monotonic()

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Keeps a step's record. Device scalars stay on the device until the part is published."""
        self._rows.append({"step": step, **record})
        self._times.append(time.time())
        late = time.monotonic() - self._published > PART_SECONDS
        if late or len(self._rows) >= PART_STEPS:
            self.flush()

    def flush(self) -> None:
        """Publishes what was written."""
        rows, times = [_plain(row) for row in jax.device_get(self._rows)], self._times
        self._rows, self._times = [], []
        self._published = time.monotonic()
        if rows:
            self._publish(rows, times)

    def drop_after(self, step: int) -> None:
        """Removes every log record later than `step`, before the first new one is written.

        Each host drops its own parts; host 0 those of all, because a run may be continued on fewer hosts.
        """
        self._rows, self._times = [], []
        if self.host == 0:
            drop_events(self.workdir / "tensorboard", step)
        for folder in LOG_FOLDERS:
            for path in _parts(self.workdir / folder):
                last, host = _part_numbers(path.name)
                if last > step and (self.host == 0 or host == self.host):
                    kept = _trim(path, step, host)
                    if kept and folder == "metrics" and host == self.host == 0:
                        write_events(self.workdir / "tensorboard", kept, [time.time()] * len(kept))
        hosts.barrier(f"logs dropped after step {step}")

    def close(self) -> None:
        """The same as `flush`: nothing is held open."""
        self.flush()

    def _publish(self, rows: list[dict[str, Any]], times: list[float]) -> None:
        write_part(self.workdir / "metrics", part_name(rows[-1]["step"], self.host), rows)
        if self.host == 0:
            write_events(self.workdir / "tensorboard", rows, times)


def part_name(step: int, host: int) -> str:
    """The name of the log part whose last record is of `step`."""
    return f"{step:08d}-host{host}.jsonl"


def _part_numbers(name: str) -> tuple[int, int]:
    """(last step, host) of STEP-…-hostH.jsonl."""
    step, host = name.split("-", 1)[0], name.rsplit("-host", 1)[-1].removesuffix(".jsonl")
    if not (step.isdigit() and host.isdigit()):
        raise ValueError(f"{name}: not a log part; their names are like {part_name(12, 0)}")
    return int(step), int(host)


def _parts(folder: epath.Path) -> list[epath.Path]:
    if not folder.exists():
        return []
    return sorted(folder.glob("*-host*.jsonl"), key=lambda path: path.name)


def _trim(path: epath.Path, step: int, host: int) -> list[dict[str, Any]]:
    """Replaces a part by its records up to `step`, and returns them. Killed in between, it can be called again."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    kept = [row for row in rows if row.get("step", step + 1) <= step]
    if kept:
        write_part(path.parent, part_name(kept[-1]["step"], host), kept)
    path.unlink(missing_ok=True)
    return kept


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.item() if isinstance(value, np.ndarray | np.generic) else value
        for name, value in record.items()
    }


class Progress:
    """A progress bar with numbers, speed and time left; plain lines every ten seconds where there is no terminal.

    Args:
        total: steps of the whole run; initial: steps already done.
        description: shown in front.
        quiet: show nothing (every host but the first).
        every_s: seconds between plain lines.
    """

    def __init__(
        self,
        total: int,
        description: str,
        initial: int = 0,
        quiet: bool = False,
        every_s: float = 10.0,
    ):
        self.total, self.description, self.done = total, description, initial
        self._quiet, self._every_s = quiet, every_s
        self._initial, self._started = initial, time.monotonic()
        self._shown = -math.inf
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=initial, desc=description, unit="step")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def advance(self, steps: int = 1, **numbers: float | str) -> None:
        """Counts steps and shows the numbers, for example reward=0.5, accuracy=0.4, length=28."""
        self.done += steps
        text = " ".join(f"{name} {_number(value)}" for name, value in numbers.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(steps)
            return
        now = time.monotonic()
        if self._quiet or (now - self._shown < self._every_s and self.done < self.total):
            return
        self._shown = now
        left = (now - self._started) / (self.done - self._initial) * (self.total - self.done)
        # The first step compiles: an hour's estimate from it would only frighten
        first = self.done - self._initial <= steps < self.total
        eta = "after the next" if first else time.strftime("%H:%M:%S", time.gmtime(left))
        print(
            f"{self.description} {self.done}/{self.total} {text} ETA {eta}",
            file=sys.stderr,
            flush=True,
        )

    def say(self, text: str) -> None:
        """Prints lines (sample completions) without tearing the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class StopSignal:
    """While open, SIGTERM and SIGINT only set a flag: the loop finishes its step, saves and raises SystemExit.

        with StopSignal() as stop:
            for step in ...:
                ...
                if code := agreed_exit(stop):   # all hosts stop at the same step
                    save(); sys.exit(code)

    Exit codes are the shell's: 143 after SIGTERM, 130 after SIGINT. A second SIGINT interrupts at once. Main thread
    only, as Python's signal handlers are.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """A signal has come."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number; 0 when none came."""
        return 0 if self.received is None else 128 + self.received

    def _receive(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        name = signal.Signals(number).name
        print(
            f"{name}: finishing this step, saving, then leaving; the same command continues",
            file=sys.stderr,
            flush=True,
        )


def agreed_exit(stop: StopSignal) -> int:
    """The exit code that all hosts leave with now, 0 to go on: SIGTERM reaches one of them first.

    Every host must call this together.
    """
    return max(hosts.gather(stop.exit_code if stop.requested else 0))


class StopTogether:
    """Lets loops of different lengths end on all hosts together: one host gets SIGTERM, another has no work left.

        together = StopTogether(stop)
        while work and not together.asked():
            ...
        code = together.finish(done=not work)   # 0: all hosts have done their work

    The hosts tell one another how they are every EXCHANGE_SECONDS, at the k-th `asked` that is due or in `finish`,
    where a host that has nothing left waits for the others: so all of them learn the same at the same place. `finish`
    is a barrier too.
    """

    def __init__(self, stop: StopSignal | None):
        self._stop, self._code = stop, 0
        self._due = time.monotonic() + EXCHANGE_SECONDS

    def asked(self) -> bool:
        """Whether to leave the loop now: this host alone is asked, or, of several, any of them was at an exchange."""
        if self._code:
            return True
        if hosts.host_count() == 1:
            self._code = self._own()
        elif time.monotonic() >= self._due:
            self._exchange(False)
            self._due = time.monotonic() + EXCHANGE_SECONDS
        return bool(self._code)

    def finish(self, done: bool) -> int:
        """Waits until all hosts are done, or one must leave; returns the exit code to leave with, 0 to go on."""
        if hosts.host_count() == 1:
            return 0 if done else self._code
        while not self._code:
            if self._exchange(done):
                return 0
            hosts.beat("waiting for the other hosts")
        return self._code

    def _exchange(self, done: bool) -> bool:
        told = hosts.gather([int(done), self._own()])
        whole = all(one for one, _ in told)
        self._code = 0 if whole else max(code for _, code in told)
        return whole

    def _own(self) -> int:
        return self._stop.exit_code if self._stop is not None and self._stop.requested else 0
