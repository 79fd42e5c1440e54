"""The parts of a search under a virtual clock: engine, preference model, sandbox, fed with the steps of stored trees.

The engine is `rollout.engine.Engine` with its queue, slots and pages; only the compiled programs under it are
replaced, by what they draw and by the seconds they take. `tasks.driver.Driver` and the searches run on it unchanged.
Host time counts nothing here.
"""

import asyncio
import dataclasses
import heapq
import math
import random
import re
import selectors
import types
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np

from smallmath_jax.data.prompts import GRAMMARS
from smallmath_jax.data.tokens import add_step_tokens, decode, encode_after, load_tokens
from smallmath_jax.models.config import tiny_config
from smallmath_jax.records import Problem, Prompt, Sampling, Tree, draw_key
from smallmath_jax.rollout import engine as engines
from smallmath_jax.rollout import programs
from smallmath_jax.search import mcts
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.steps import Candidate, CodeResult, program
from smallmath_jax.search.tree import LiveNode, children_of, from_record
from smallmath_jax.search.vote import SCALES
from smallmath_jax.tasks.driver import Driver, Host, Judge, same_answer

TOKENS = add_step_tokens(load_tokens("tiny"), GRAMMARS["code_steps"].marks)
NEWLINE = int(encode_after(TOKENS, "\n")[0])
Program = tuple[str, str]  # prefix and code, see `plain`


@dataclasses.dataclass(frozen=True)
class Costs:
    """Milliseconds of one call. A decode step takes as long with one busy slot as with all: its shapes are fixed."""

    decode: float = 5.0  # one step of all slots
    prefill: float = 10.0  # up to prefill_rows pages
    fill: float = 1.0  # up to 32 pages copied into slots


@dataclasses.dataclass(frozen=True)
class Shape:
    """The engine's sizes, named as in config.engine, and the workers of the sandbox."""

    slots: int = 128
    cache_length: int = 128
    prefill_chunk: int = 16
    decode_steps: int = 4
    pages: int = 0
    workers: int = 2
    max_tokens: int = 16  # of a step


# ---- what was recorded


@dataclasses.dataclass(frozen=True)
class Replay:
    """Stored trees as what the policy, the preference model, the interpreter and the grader say."""

    problems: list[Problem]
    draws: dict[bytes, tuple[np.ndarray, float]]  # draw key -> the step's ids and log-prob
    results: dict[Program, CodeResult]
    scores: dict[tuple[str, str], float]
    verdicts: dict[tuple[str, str], str]


def replay(trees: Sequence[Tree], lengths: Callable[[np.ndarray], int] | None = None) -> Replay:
    """What gives these trees again. `lengths`: draw key -> tokens of the step, at least those it was written with.

    Repeated and dropped candidates are not in a tree; each stands in as a repetition of one that is. A step is
    lengthened by empty lines at its start, which change neither its program nor what it is taken for.
    """
    found = Replay([], {}, {}, {}, {})
    for tree in trees:
        problem = Problem(tree.problem_id, tree.problem, tree.gold)
        found.problems.append(problem)
        names, count = (
            (tree.seed, tree.problem_id, tree.round),
            tree.extra["settings"]["candidates"],
        )
        for tag, children in children_of(tree).items():
            for sample in range(count if children else 0):
                child, key = children[sample % len(children)], draw_key(*names, tag, sample)
                ids = np.asarray(child.token_ids[: child.written], np.int32)
                more = max(lengths(key) - len(ids), 0) if lengths else 0
                ids = np.concatenate([np.full(more, NEWLINE, np.int32), ids])
                found.draws[key.tobytes()] = ids, child.log_prob
        _observe(tree, from_record(tree).nodes, found)
    return found


def _observe(tree: Tree, nodes: Iterable[LiveNode], found: Replay) -> None:
    texts = {"0": ""}
    for node in nodes:
        if node.parent is None:
            continue
        texts[node.tag] = texts[node.parent.tag] + node.text
        if node.status:
            ran = CodeResult(node.status, node.output, node.error)
            found.results[plain(program(node.parent, node.text))] = ran
        if node.score is not None:
            found.scores[tree.problem_id, _joined(texts[node.tag])] = node.score
        if node.kind == "answer":
            found.verdicts[tree.problem_id, node.answer] = node.verdict


def plain(asked: Program) -> Program:
    """A program without the empty lines that lengthen its steps."""
    return tuple(re.sub("\n+", "\n", text) for text in asked)


def _joined(text: str) -> str:
    return text.replace("\n", "")


def lognormal(median: float, sigma: float, most: float) -> Callable[[Any], float]:
    """name -> a lognormal draw that the name determines, cut at `most`."""

    def draw(name: Any) -> float:
        rng = np.random.default_rng(draw_key("duration", median, str(name)))
        return min(median * math.exp(sigma * rng.standard_normal()), most)

    return draw


# ---- made-up trees


def made_trees(count: int, settings: SearchSettings) -> list[Tree]:
    """Trees of a made-up policy: every candidate is new, 2 to 9 steps to an answer, one program of ten fails."""
    return [_made(f"made-{number}", settings) for number in range(count)]


def _made(name: str, settings: SearchSettings) -> Tree:
    right = random.Random(name).uniform(0.05, 0.95)  # of this problem's answers
    goes_on = random.Random(name + "/length").uniform(0.5, 0.85)

    async def generate(text: str, count: int, keys: Any) -> list[Candidate]:
        return [_made_step(text, random.Random(key.tobytes()), goes_on, right) for key in keys]

    async def run_code(programs: list[Program]) -> list[CodeResult]:
        bad = lambda code: random.Random(code).random() < 0.1
        return [CodeResult("error" if bad(code) else "ok", "7") for _, code in programs]

    async def score(texts: list[str]) -> list[float]:
        return [random.Random(name + text).uniform(-0.9, 0.9) for text in texts]

    async def grade(answer: str) -> str:
        return "correct" if answer == "7" else "wrong"

    return mcts.search_now(
        Problem(name, f"What is {name}?", "7"),
        "",
        settings=settings,
        generate=generate,
        append=lambda text, ids: text + TOKENS.tokenizer.decode(ids),
        encode=lambda text: encode_after(TOKENS, text).tolist(),
        run_code=run_code,
        score=score if settings.guidance == "ppm" else None,
        grade=grade,
        equal=same_answer,
    )


def _made_step(text: str, source: random.Random, goes_on: float, right: float) -> Candidate:
    if text.endswith("<end_of_output>"):
        answer = "7" if source.random() < right else str(source.randrange(100))
        step = f"\n<answer>\\boxed{{{answer}}}<end_of_answer>"
    else:
        mark = "<end_of_step>" if source.random() < goes_on else "<end_of_code>"
        step = f"{'' if text else '<code>'}\nx={source.randrange(10**6)}\n{mark}"
    return Candidate(step, encode_after(TOKENS, step).tolist(), -source.random(), "stop")


# ---- the clock


@dataclasses.dataclass
class Clock:
    now: float = 0.0  # seconds


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that never sleeps: waiting moves the clock. Threads run at once, and take no time."""

    def __init__(self, clock: Clock):
        self._virtual = clock
        super().__init__(_Selector(clock))

    def time(self) -> float:
        return self._virtual.now

    def run_in_executor(self, executor: Any, function: Callable, *arguments: Any) -> asyncio.Future:
        done = self.create_future()
        done.set_result(function(*arguments))
        return done


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock: Clock):
        super().__init__()
        self._virtual = clock

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            raise RuntimeError("everything waits and nothing is on its way")
        self._virtual.now += max(timeout, 0.0)
        return super().select(0)


def run_virtual(clock: Clock, body: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Runs a coroutine on a loop of this clock."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        return runner.run(body())


# ---- the engine's programs


class Clockwork:
    """Stands in for `rollout.pool.Programs`: draws what was recorded, and moves the clock by what a call costs."""

    compilations = recompilations = 0

    def __init__(self, clock: Clock, costs: Costs, draws: Mapping[bytes, tuple[np.ndarray, float]]):
        self._clock, self._costs, self._draws = clock, costs, draws
        self.seconds = {"decode": 0.0, "prefill": 0.0, "fill_slots": 0.0}

    def run(self, called: Callable, shape: programs.Shape, *arguments: Any) -> Any:
        if called is programs.prepare:
            head = types.SimpleNamespace(value_head=True)
            return types.SimpleNamespace(unpack=lambda: types.SimpleNamespace(model=head))
        if called is programs.make_caches:
            return None, None
        if called is programs.prefill:
            self._spend("prefill", self._costs.prefill)
            return None, np.zeros(shape.prefill_rows, np.float32)
        if called is programs.fill_slots:
            self._spend("fill_slots", self._costs.fill)
            return None
        _, _, rows, leave = arguments
        out = self._decode(shape, rows, int(leave))
        self._spend("decode", int(out.steps) * self._costs.decode)
        return None, out

    def _spend(self, name: str, milliseconds: float) -> None:
        self._clock.now += milliseconds / 1000
        self.seconds[name] += milliseconds / 1000

    def _decode(self, shape: programs.Shape, rows: programs.Rows, leave: int) -> programs.Decoded:
        """As `programs.decode`: up to decode_steps tokens, ends when at most `leave` rows are still active."""
        active = np.flatnonzero(rows.active)
        lines = [self._draws[rows.keys[slot].tobytes()] for slot in active]
        whole = np.array([len(ids) for ids, _ in lines])
        if (whole > rows.limit[active]).any():
            raise ValueError(
                "a recorded step is longer than the cache has room for: raise cache_length"
            )
        left = whole - rows.count[active]
        steps = min(shape.decode_steps, int(np.sort(left)[len(active) - leave - 1]))
        tokens = np.zeros((shape.decode_steps, shape.slots), np.int32)
        log_probs = np.zeros((shape.decode_steps, shape.slots), np.float32)
        count, reason = rows.count.copy(), np.zeros(shape.slots, np.int32)
        for slot, (ids, log_prob), rest in zip(active, lines, left, strict=True):
            drawn = min(steps, int(rest))
            tokens[:drawn, slot] = ids[count[slot] : count[slot] + drawn]
            count[slot] += drawn
            if drawn == rest:
                log_probs[drawn - 1, slot] = log_prob
                reason[slot] = _reason(ids)
        return programs.Decoded(tokens, log_probs, count, reason, np.int32(steps))


def _reason(ids: np.ndarray) -> int:
    if ids[-1] in TOKENS.step_ids.values():
        return programs.STOP
    return programs.EOS if ids[-1] in TOKENS.eos_ids else programs.LENGTH


def make_engine(clockwork: Clockwork, shape: Shape, slots: int = 0) -> engines.Engine:
    """The real engine over a clockwork in place of compiled programs."""
    sizes = {
        name: getattr(shape, name)
        for name in ("cache_length", "prefill_chunk", "decode_steps", "pages")
    }
    tiny = tiny_config(
        vocab_size=TOKENS.vocab_rows,
        image_token_id=TOKENS.image_id,
        video_token_id=TOKENS.video_id,
        vision_start_token_id=TOKENS.vision_start,
        vision_end_token_id=TOKENS.vision_end,
        eos_ids=TOKENS.eos_ids,
        pad_id=TOKENS.pad_id,
    )
    with mock.patch.object(engines, "Programs", lambda: clockwork):
        return engines.Engine(
            tiny,
            jnp.zeros(1),
            slots=slots or shape.slots,
            eos_ids=TOKENS.eos_ids,
            banned_ids=TOKENS.banned_ids,
            pad_id=TOKENS.pad_id,
            image_settings=None,
            max_patches=4,
            **sizes,
        )


class Scorer:
    """A judge's engine: computes pages as any other, and says the scores that were recorded."""

    def __init__(self, engine: engines.Engine, scores: Mapping[tuple[str, str], float]):
        self._engine, self._scores = engine, scores
        self._paths: dict[int, tuple[str, str]] = {}
        self.cache_length = engine.cache_length

    def root(self, prompt: Prompt) -> int:
        node = self._engine.root(prompt)
        self._paths[node] = prompt.problem_id, ""
        return node

    def append(self, node: int, token_ids: Sequence[int]) -> int:
        name, text = self._paths[node]
        child = self._engine.append(node, token_ids)
        self._paths[child] = name, text + _joined(decode(TOKENS, token_ids))
        return child

    def prune(self, node: int) -> None:
        self._engine.prune(node)

    def scores(self, nodes: Sequence[int]) -> list[float]:
        self._engine.scores(nodes)
        # A hair inside (-1, 1): atanh of a score that was rounded to 1 has no value
        return [
            math.atanh(max(-1 + 1e-9, min(1 - 1e-9, self._scores[self._paths[node]])))
            for node in nodes
        ]


# ---- the sandbox


class Workers:
    """A sandbox of W workers, first come first served; the same program runs once, as in the real one."""

    def __init__(
        self, results: Mapping[Program, CodeResult], seconds: Callable[[Program], float], count: int
    ):
        self._results, self._seconds = results, seconds
        self._free = [0.0] * count  # when each worker is free again
        self._known: dict[Program, float] = {}  # when it is done
        self.busy = 0.0

    async def run(self, prefix: str, code: str) -> CodeResult:
        asked, loop = plain((prefix, code)), asyncio.get_running_loop()
        if asked not in self._known:
            spent = self._seconds(asked)
            self._known[asked] = max(self._free[0], loop.time()) + spent
            heapq.heapreplace(self._free, self._known[asked])
            self.busy += spent
        if self._known[asked] > loop.time():
            done = loop.create_future()
            loop.call_at(self._known[asked], lambda: done.done() or done.set_result(None))
            await done
        return self._results[asked]


# ---- all of it


@dataclasses.dataclass(frozen=True)
class World:
    """One driver over virtual parts, and what they did."""

    clock: Clock
    clockwork: Clockwork
    workers: Workers
    driver: Driver
    problems: list[Problem]

    def measures(self) -> dict[str, float]:
        """Seconds, and the busy share of slots while decoding, of slots in all the time, and of workers."""
        counts, wall = self.driver.engine.counters(), self.clock.now
        decoding = self.clockwork.seconds["decode"] / wall
        return {
            "seconds": wall,
            "occupancy": counts["occupancy"],
            "occupancy_of_all": counts["occupancy"] * decoding,
            "device": sum(self.clockwork.seconds.values()) / wall,
            "workers": self.workers.busy / wall / len(self.workers._free),
            "tokens": counts["decoded_tokens"],
        }


def make_world(
    recorded: Replay, shape: Shape, costs: Costs, seconds: Callable[[Program], float]
) -> World:
    """`seconds`: how long a program runs."""
    clock = Clock()
    clockwork = Clockwork(clock, costs, recorded.draws)
    workers = Workers(recorded.results, seconds, shape.workers)
    grade = lambda problem, answer: recorded.verdicts[problem.id, answer]
    judge = None
    if recorded.scores:
        judge = Judge(
            Scorer(make_engine(clockwork, shape, slots=8), recorded.scores), SCALES["ppm_tanh"]
        )
    driver = Driver(
        types.SimpleNamespace(tokens=TOKENS),
        make_engine(clockwork, shape),
        Host(workers.run, grade, "virtual"),
        grammar="code_steps",
        sampling=Sampling(),
        max_tokens=shape.max_tokens,
        judge=judge,
    )
    return World(clock, clockwork, workers, driver, recorded.problems)


def prompt_of(problem: Problem) -> Prompt:
    """The problem's text alone: its pictures are looked at once a problem under either schedule."""
    ids = encode_after(TOKENS, problem.problem).astype(np.int32)
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    return Prompt(problem.id, problem.problem, ids, positions, len(ids))
