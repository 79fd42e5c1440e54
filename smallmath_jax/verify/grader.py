"""Grading completions: our own comparison first, math-verify in a killable process for what that leaves undecided.

A signal cannot interrupt a long C call and only reaches the main thread; so each second opinion runs in a process of
its own, forked from one that has math-verify loaded (see `second_opinion`), and is killed from outside when its time
is over. That process is a fresh interpreter, never a fork of one with jax and its threads, and is started by a
long-lived thread: Linux sends the parent-death signal when the thread that started a child ends.
"""

import collections
import dataclasses
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from smallmath_jax.verify.answers import Policy, compare, find_answer, gradable, read
from smallmath_jax.verify.policy import DEFAULT

CPU_S = 1.5  # of one second opinion: the same at any load
WALL_S = 2.6  # of one second opinion, where the machine is too busy to give it that
START_S = 60.0  # for the process to load; not counted against the pair that waits
GRACE_S = 5.0  # beyond the wall time, before the process itself counts as lost
MEMORY_MB = 2_048
VERDICTS = ("correct", "wrong", "no_answer", "unparsable_gold", "timeout")

Gold = str | Sequence[str]  # a gold answer, or several of which any is right

# What is said of an answer by several golds: not to know one comparison outweighs that another failed (law 7).
_KINDEST = ("correct", "timeout", "unparsable_gold", "wrong")
_SCRIPT = Path(__file__).with_name("second_opinion.py")
_KEPT = (
    "PATH",
    "HOME",
    "LD_LIBRARY_PATH",
    "LANG",
    "TMPDIR",
)  # the process needs no other environment


@dataclasses.dataclass(frozen=True)
class Graded:
    """A verdict, the answer it is about, the rule that found the answer, and whether math-verify was asked."""

    verdict: str  # correct | wrong | no_answer | unparsable_gold | timeout
    extracted: str | None = None
    rule: str = "none"
    fallback: bool = False


class Grader:
    """Grades from any thread. Use as a context manager, or call `close`.

    A gold answer is a text, or several texts of which any is right (`Problem.accepted`).
    `workers` second opinions run at once. Counters: graded, one per verdict, fallback (second opinions asked),
    restarts (processes lost) and missing (opinions not to be had, math-verify not being installed).
    """

    def __init__(
        self,
        workers: int = 1,
        policy: Policy = DEFAULT,
        cpu_s: float = CPU_S,
        wall_s: float = WALL_S,
        memory_mb: int = MEMORY_MB,
    ) -> None:
        self._limits = {"cpu_s": cpu_s, "wall_s": wall_s}
        self.policy = policy
        self.workers = workers
        self._memory_mb = memory_mb
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._opinions: dict[tuple[str, str], str] = {}
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="grader-keeper")
        self._closed = False
        self._idle: queue.Queue[Future[_Opinions]] = queue.Queue()
        for _ in range(workers):
            self._idle.put(self._keeper.submit(_Opinions, memory_mb))

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def grade(self, gold: Gold, text: str, mode: str = "strict", prefix: str = "") -> Graded:
        """The verdict on a completion; `prefix` is what was put after the generation prompt."""
        found = find_answer(text, mode, prefix)
        if found.answer is None:
            readable = any(read(one).canonical for one in _each(gold))
            verdict = "no_answer" if readable else "unparsable_gold"
            return self._count(Graded(verdict, None, found.rule))
        return self._judge(gold, found.answer, found.rule)

    def grade_answer(self, gold: Gold, answer: str) -> Graded:
        r"""The verdict on a bare answer; a \boxed or <answer> in it is opened first."""
        found = find_answer(answer)
        if found.answer is not None:
            return self._judge(gold, found.answer, found.rule)
        if not answer.strip():
            return self._count(Graded("no_answer", None))
        return self._judge(gold, answer.strip(), "bare")

    def grade_many(
        self, pairs: Sequence[tuple[Gold, str]], mode: str = "strict", prefix: str = ""
    ) -> list[Graded]:
        """Verdicts on (gold, completion) pairs, in order."""
        if self.workers == 1:
            return [self.grade(gold, text, mode, prefix) for gold, text in pairs]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda pair: self.grade(*pair, mode, prefix), pairs))

    def counters(self) -> dict[str, int]:
        """What happened so far."""
        with self._lock:
            return {
                name: self._counts[name]
                for name in ("graded", *VERDICTS, "fallback", "restarts", "missing")
            }

    def close(self) -> None:
        """Ends the processes, once no opinion is being formed. Grading after this raises RuntimeError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for _ in range(self.workers):
            self._idle.get().result().kill()
        self._keeper.shutdown()

    def _judge(self, gold: Gold, answer: str, rule: str) -> Graded:
        """The verdict by the gold answer that is kindest to it, in the order of _KINDEST."""
        graded = []
        for one in _each(gold):
            graded.append(self._judge_one(one, answer, rule))
            if graded[-1].verdict == "correct":
                break
        best = min(graded, key=lambda one: _KINDEST.index(one.verdict))
        asked = any(one.fallback for one in graded)
        return self._count(dataclasses.replace(best, fallback=asked))

    def _judge_one(self, gold: str, answer: str, rule: str) -> Graded:
        verdict = compare(gold, answer, self.policy)
        if verdict != "undecided":
            return Graded(verdict, answer, rule)
        told, said = (read(text).text.strip(" $.") for text in (gold, answer))
        opinion = self._opinion(told, said)
        verdict = {"equal": "correct", "unparsable": "unparsable_gold", "timeout": "timeout"}.get(
            opinion, "wrong"
        )
        if verdict == "unparsable_gold" and read(gold).nodes:
            verdict = "wrong"  # we can read it; only the answer is strange
        return Graded(verdict, answer, rule, fallback=True)

    def _count(self, graded: Graded) -> Graded:
        with self._lock:
            self._counts.update(("graded", graded.verdict))
            self._counts["fallback"] += graded.fallback
        return graded

    def _opinion(self, gold: str, answer: str) -> str:
        """equal | different | unparsable | error | timeout | missing. Timeouts are never remembered."""
        key = (gold, answer)
        if key in self._opinions:
            return self._opinions[key]
        if self._closed:
            raise RuntimeError("this Grader is closed; make a new one")
        future = self._idle.get()
        try:
            opinion = future.result().ask(gold, answer, self._limits)
        except BaseException:
            future = self._replace(future)  # it may still send an answer nobody would read
            raise
        else:
            if opinion == "lost":
                future, opinion = self._replace(future), "timeout"
        finally:
            self._idle.put(future)
        with self._lock:
            self._counts["missing"] += opinion == "missing"
            if opinion != "timeout":
                if len(self._opinions) >= 20_000:
                    self._opinions.clear()
                self._opinions[key] = opinion
        return opinion

    def _replace(self, future: "Future[_Opinions]") -> "Future[_Opinions]":
        future.result().kill()
        with self._lock:
            self._counts["restarts"] += 1
        return self._keeper.submit(_Opinions, self._memory_mb)


class _Opinions:
    """One process that forms second opinions, and the pipes to it."""

    def __init__(self, memory_mb: int) -> None:
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), str(os.getpid()), str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        self._left = b""
        self._state = ""  # ready | missing, once known

    def ask(self, gold: str, answer: str, limits: dict[str, float]) -> str:
        """One opinion; `timeout` when its time ran out, `lost` when the process must be replaced."""
        if not self._state:
            self._state = self._line(START_S)
        if self._state != "ready":
            return self._state
        request = json.dumps({"gold": gold, "answer": answer, **limits}) + "\n"
        try:
            self._process.stdin.write(request.encode())
        except BrokenPipeError:
            return "lost"
        return self._line(limits["wall_s"] + GRACE_S)

    def _line(self, wall_s: float) -> str:
        end = time.monotonic() + wall_s
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._left:
            remaining = end - time.monotonic()
            if remaining <= 0 or not poll.poll(remaining * 1000):
                return "lost"
            chunk = os.read(self._process.stdout.fileno(), 4096)
            if not chunk:
                return "lost"
            self._left += chunk
        line, _, self._left = self._left.partition(b"\n")
        return line.decode()

    def kill(self) -> None:
        """SIGKILL, and the pipes closed."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def _each(gold: Gold) -> Sequence[str]:
    return (gold,) if isinstance(gold, str) else gold


def ungradable(golds: Iterable[str]) -> list[int]:
    """Indices of gold answers that can only be compared word by word: look at them before training on them."""
    return [index for index, gold in enumerate(golds) if not gradable(gold)]
