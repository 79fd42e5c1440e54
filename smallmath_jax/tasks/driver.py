"""Thousands of searches over one engine, one preference model and one sandbox, in one thread.

Every search is a coroutine that waits for its own calls alone. The driver lets the coroutines go as far as they can,
answers all waiting scores together, runs one decode loop of the engine, hands out what came back, and looks again.
There is no lock-step: slots fill up with whatever step of whichever problem is next.
"""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from smallmath_jax.data.prompts import GRAMMARS, stop_sequences
from smallmath_jax.data.tokens import decode, encode_after
from smallmath_jax.parallel import hosts
from smallmath_jax.records import Problem, Prompt, Sampling
from smallmath_jax.rollout.engine import Engine, Limits, Rollout
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.steps import Candidate
from smallmath_jax.search.vote import Scale
from smallmath_jax.tasks import runs
from smallmath_jax.tasks.policy import Policy
from smallmath_jax.verify.answers import compare
from smallmath_jax.verify.grader import Grader
from smallmath_jax.verify.sandbox import SandboxSettings, start_sandbox

HOPS = 12  # turns of the event loop in which a coroutine that was answered reaches its next call
WORST = -1.0  # score of a path that is too long to be read: it cannot go on either


class Place(NamedTuple):
    """Where a search stands: a node of the engine's tree, one of the preference model's, and the tokens so far."""

    node: int
    judged: int | None
    length: int


@dataclasses.dataclass(frozen=True)
class Judge:
    """A preference model to score with: tanh(value / scale.squash) of the last token of a path."""

    engine: Engine
    scale: Scale


@dataclasses.dataclass(frozen=True)
class Host:
    """What the host gives to searches, besides models.

    run_program: (prefix, code) -> what the sandbox returns. grade: (problem, answer) -> verdict; may block.
    """

    run_program: Callable[[str, str], Awaitable[Any]]
    grade: Callable[[Problem, str], str]
    tier: str = ""  # the sandbox's, stored with every tree


@contextlib.contextmanager
def open_host(settings: Any) -> Iterator[Host]:
    """A sandbox by `settings` (fields of SandboxSettings) and a grader, for as long as the context is open."""
    with start_sandbox(SandboxSettings(**settings)) as sandbox, Grader() as grader:
        missing = [name for name in sandbox.settings.modules if name not in sandbox.modules]
        if missing:
            runs.say(f"sandbox: {', '.join(missing)} cannot be imported (sandbox.modules)")
        if sandbox.weaker:
            runs.say(
                f"sandbox: {sandbox.tier}, {sandbox.isolation}; no more because {'; '.join(sandbox.weaker)}"
            )
        grade = lambda problem, answer: grader.grade_answer(problem.accepted, answer).verdict
        yield Host(sandbox.run, grade, sandbox.tier)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Tickets of one expansion, on their way."""

    rollouts: list[Rollout | None]
    done: asyncio.Future


class Driver:
    """Runs coroutines that use one policy engine, and resolves what they wait for.

    Args:
        policy: tokenizer and grammar marks; its weights are those of `engine`.
        grammar: name in GRAMMARS; its stops end a step.
        sampling: how steps are drawn; max_tokens of them.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        host: Host,
        *,
        grammar: str,
        sampling: Sampling,
        max_tokens: int,
        judge: Judge | None = None,
    ):
        self.policy, self.engine, self.host, self.judge = policy, engine, host, judge
        self.sampling = sampling
        self.limits = Limits(max_tokens, stop_sequences(policy.tokens, GRAMMARS[grammar]))
        self._owners: dict[int, tuple[_Group, int]] = {}  # ticket -> (its group, its place in it)
        self._asked: list[tuple[list[Place], asyncio.Future]] = []  # scores
        self._verdicts: dict[tuple[str, str], str] = {}
        self._wake = asyncio.Event()
        self._broken: BaseException | None = None

    # ---- what a search may call

    def open(self, prompt: Prompt) -> Place:
        """The prompt's root in both trees."""
        judged = self.judge.engine.root(prompt) if self.judge else None
        return Place(self.engine.root(prompt), judged, len(prompt.token_ids))

    def close(self, root: Place) -> None:
        """Forgets a root and all below it."""
        self.engine.prune(root.node)
        if root.judged is not None:
            self.judge.engine.prune(root.judged)

    def callables(self, problem: Problem, settings: SearchSettings) -> dict[str, Any]:
        """The callables of `search.expand.Search` for one problem."""

        async def grade(answer: str) -> str:
            return await self.grade(problem, answer)

        scores = self.judge is not None and (settings.guidance == "ppm" or not settings.use_gold)
        return {
            "generate": self.generate,
            "append": self.append,
            "encode": self.encode,
            "run_code": self.run_code,
            "score": self.score if scores else None,
            "grade": grade if settings.use_gold else None,
            "equal": same_answer,
        }

    async def generate(
        self,
        place: Place,
        count: int,
        keys: np.ndarray,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
    ) -> list[Candidate]:
        """`count` continuations of a path; none where the cache has no room left behind it."""
        limits = limits or self.limits
        room = self.engine.cache_length - place.length
        if room < 1:
            return []
        limits = dataclasses.replace(limits, max_tokens=min(limits.max_tokens, room))
        group = _Group([None] * count, asyncio.get_running_loop().create_future())
        tickets = self.engine.submit(place.node, count, limits, sampling or self.sampling, keys)
        self._owners.update({ticket: (group, index) for index, ticket in enumerate(tickets)})
        self._wake.set()
        try:
            await group.done
        finally:  # a search that is cancelled, or whose server failed, leaves tickets behind
            for ticket in tickets:
                self._owners.pop(ticket, None)
        return [self._candidate(rollout) for rollout in group.rollouts]

    def append(self, place: Place, token_ids: Sequence[int]) -> Place:
        """The place behind given tokens."""
        judged = None
        if place.judged is not None:
            judged = self.judge.engine.append(place.judged, token_ids)
        node = self.engine.append(place.node, token_ids)
        return Place(node, judged, place.length + len(token_ids))

    def encode(self, text: str) -> list[int]:
        return encode_after(self.policy.tokens, text).tolist()

    async def run_code(self, programs: Sequence[tuple[str, str]]) -> list[Any]:
        run = self.host.run_program
        return await asyncio.gather(*(run(prefix, code) for prefix, code in programs))

    async def score(self, places: Sequence[Place]) -> list[float]:
        """Scores in [-1, 1], computed with those of all other searches that wait."""
        done = asyncio.get_running_loop().create_future()
        self._asked.append((list(places), done))
        self._wake.set()
        return await done

    async def grade(self, problem: Problem, answer: str) -> str:
        """The verdict on an answer; a second opinion that takes long holds up this search alone."""
        key = (problem.id, answer)
        if key not in self._verdicts:
            self._verdicts[key] = await asyncio.to_thread(self.host.grade, problem, answer)
        return self._verdicts[key]

    # ---- the loop

    async def run(
        self,
        jobs: Iterable[Callable[[], Coroutine[Any, Any, Any]]],
        in_flight: int,
        finished: Callable[[Any], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Runs all jobs, at most `in_flight` at a time; `finished` gets each one's result as it comes.

        Returns False when `stop` said so: then what was under way is dropped. Raises what a job or the sandbox raises.
        May be called again, on another event loop.
        """
        self._wake = asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(self._break)
        waiting, running = iter(jobs), set()
        try:
            while not stop():
                while len(running) < in_flight and (job := next(waiting, None)) is not None:
                    running.add(self._start(job()))
                if not running:
                    return True
                await self._settle()
                for task in [task for task in running if task.done()]:
                    running.discard(task)
                    finished(task.result())
                    hosts.beat("a search")
                if not self._advance() and running:
                    await self._wait()
            return False
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _start(self, body: Coroutine[Any, Any, Any]) -> asyncio.Task:
        task = asyncio.create_task(body)
        task.add_done_callback(lambda _: self._wake.set())
        return task

    async def _settle(self) -> None:
        for _ in range(HOPS):
            await asyncio.sleep(0)
        if self._broken is not None:
            raise self._broken

    async def _wait(self) -> None:
        """Nothing for the devices to do: sleeps until a search asks for something, or ends."""
        with contextlib.suppress(TimeoutError):  # so that a signal to stop is seen
            await asyncio.wait_for(self._wake.wait(), 0.5)
        self._wake.clear()

    def _break(self, _loop: Any, context: dict[str, Any]) -> None:
        """What fails between the searches, as a sandbox that cannot go on, ends them all."""
        self._broken = context.get("exception") or RuntimeError(context["message"])
        self._wake.set()

    def _advance(self) -> bool:
        """Answers all waiting scores, then runs one decode loop. Returns whether there was anything to do."""
        asked, self._asked = self._asked, []
        if asked:
            self._answer(asked)
            hosts.beat("scoring")
        if not self._owners:
            return bool(asked)
        done = self.engine.step()
        if done:  # a server that does not answer is no progress
            hosts.beat("sampling")
        for ticket, rollout in done:
            if ticket not in self._owners:  # nobody waits for it any more
                continue
            group, index = self._owners.pop(ticket)
            if isinstance(rollout, Exception):  # of a server; the search that asked ends by it
                if not group.done.done():
                    group.done.set_exception(rollout)
                continue
            group.rollouts[index] = rollout
            if None not in group.rollouts and not group.done.done():
                group.done.set_result(None)
        return True

    def _answer(self, asked: list[tuple[list[Place], asyncio.Future]]) -> None:
        engine, squash = self.judge.engine, self.judge.scale.squash
        fits = [
            place for places, _ in asked for place in places if place.length <= engine.cache_length
        ]
        raw = dict(zip(fits, engine.scores([place.judged for place in fits]), strict=True))
        for places, done in asked:
            if not done.done():
                scores = [
                    squashed(raw[place], squash) if place in raw else WORST for place in places
                ]
                done.set_result(scores)

    def _candidate(self, rollout: Rollout) -> Candidate:
        return Candidate(
            text=decode(self.policy.tokens, rollout.token_ids),
            token_ids=[int(token) for token in rollout.token_ids],
            log_prob=float(rollout.log_probs.sum()),
            stop_reason=rollout.stop_reason,
        )


def squashed(raw: float, squash: float) -> float:
    """A raw value as a score in [-1, 1]."""
    return math.tanh(raw / squash)


def same_answer(first: str, second: str) -> bool:
    """Whether two answers are surely equal; what only a second opinion could tell counts as different."""
    return compare(first, second) == "correct"


class Meter:
    """Occupancy and tokens a second of an engine since this was made. A server's slots are not known, nor how full."""

    def __init__(self, engine: Engine):
        self._engine, self._before = engine, engine.counters()

    def read(self) -> dict[str, float]:
        now = self._engine.counters()
        since = {
            name: now[name] - self._before[name]
            for name in ("decoded_tokens", "decode_steps", "decode_seconds", "prefill_seconds")
        }
        seconds = since["decode_seconds"] + since["prefill_seconds"]
        row_steps = since["decode_steps"] * self._engine.slots
        rate = since["decoded_tokens"] / seconds if seconds else 0.0
        occupancy = {"occupancy": since["decoded_tokens"] / row_steps} if row_steps else {}
        return {**occupancy, "tokens_per_second": rate, **since}

    def shown(self) -> dict[str, float]:
        """What a progress bar shows of it."""
        rates = self.read()
        names = {"occupancy": "occupancy", "tok/s": "tokens_per_second"}
        return {label: rates[name] for label, name in names.items() if name in rates}
