"""A local model as the policy of round 1, by few-shot prompts: it stands where an Engine stands, as a server does.

It keeps its vocabulary: marks are text to it. Instructions and examples are prefilled once for all problems. Where its
tokenizer is also the policy's, in text form, the ids it draws travel to the trainer; else its steps are encoded once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from smallmath_jax.data.few_shot import few_shot_question, few_shot_start, first_step
from smallmath_jax.data.prompts import GRAMMARS, stop_sequences
from smallmath_jax.data.tokens import Tokens, decode, encode_after
from smallmath_jax.records import Problem, Prompt, Sampling
from smallmath_jax.rollout.engine import Engine, Limits, Rollout
from smallmath_jax.tasks.policy import load_policy
from smallmath_jax.tasks.rollouts import make_engine

GRAMMAR = GRAMMARS["code_steps"]


def open_local(
    config: Any, tokens: Tokens, problems: Sequence[Problem], mesh: jax.sharding.Mesh
) -> "LocalEngine":
    """The model `config.bootstrap.model` names, ready to search `problems`; `tokens` are those of config.model.

    Its engine has config.engine's sizes and room for the few-shot prompt besides. Raises as `load_policy`.
    """
    own = config.copy_and_resolve_references()
    own.update({"model": config.bootstrap.model, "init_from": "", "freeze": ""})
    own.prompt.step_tokens = False
    own.lora.rank = 0
    model = load_policy(own, mesh)
    start = model.tokens.tokenizer.encode(few_shot_start(config.bootstrap.shots))
    own.engine.cache_length = config.engine.cache_length + len(start)
    engine = make_engine(model, own)
    return LocalEngine(engine, model.tokens, start, tokens, problems, config.engine.cache_length)


class LocalEngine:
    """What a search asks of an Engine, answered by one of another vocabulary: root, append, submit, step, prune.

    Nodes are those of `engine`. Ids that come in and go out are those of `tokens`; what the model drew is kept beside
    them, so that it reads its own ids again. Use as a context manager.

    Args:
        engine: the model's, its caches `len(start)` longer than `cache_length`.
        own: the model's tokenizer.
        start: ids of instructions and examples, common to all problems.
        tokens: the policy's tokenizer.
        problems: those that `root` may be asked for.
        cache_length: tokens a prompt and its path may have, as `tokens` counts.
    """

    version = 0

    def __init__(
        self,
        engine: Engine,
        own: Tokens,
        start: Sequence[int],
        tokens: Tokens,
        problems: Sequence[Problem],
        cache_length: int,
    ):
        self._engine, self._own, self._tokens = engine, own, tokens
        self.slots, self.cache_length = engine.slots, cache_length
        self._problems = {problem.id: problem for problem in problems}
        self._stops = stop_sequences(own, GRAMMAR)
        self._same = same_tokenizer(own, tokens)
        ids = np.asarray(start, np.int32)
        positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
        self._start = engine.root(Prompt("few-shot examples", "", ids, positions, len(ids)))
        self._lengths = {self._start: len(ids)}
        self._drawn: dict[int, dict[tuple[int, ...], Sequence[int]]] = {}  # node -> ids -> own ids
        self._asked: dict[int, int] = {}  # ticket -> node
        self._full: list[int] = []  # tickets of paths without room, below 0
        self._next_full = -1

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *_: Any) -> None:
        self._engine.prune(self._start)

    def root(self, prompt: Prompt) -> int:
        question = few_shot_question(self._problems[prompt.problem_id])
        return self._add(self._start, encode_after(self._own, question).tolist())

    def append(self, node: int, token_ids: Sequence[int]) -> int:
        ids = [int(token) for token in token_ids]
        own = ids if self._same else self._drawn.get(node, {}).get(tuple(ids))
        if own is None:
            own = encode_after(self._own, decode(self._tokens, ids)).tolist()
        return self._add(node, own)

    def _add(self, parent: int, own: Sequence[int]) -> int:
        node = self._engine.append(parent, own)
        self._lengths[node] = self._lengths[parent] + len(own)
        return node

    def prune(self, node: int) -> None:
        gone = self._engine.prune(node)
        for one in gone:
            del self._lengths[one]
            self._drawn.pop(one, None)
        self._asked = {ticket: at for ticket, at in self._asked.items() if at not in gone}
        self._full = [ticket for ticket in self._full if ticket in self._asked]

    def submit(
        self, node: int, n: int, limits: Limits, sampling: Sampling, keys: np.ndarray
    ) -> list[int]:
        room = self._engine.cache_length - self._lengths[node]
        if room < 1:
            tickets = [self._next_full - number for number in range(n)]
            self._next_full -= n
            self._full += tickets
        else:
            limits = Limits(min(limits.max_tokens, room), self._stops)
            tickets = self._engine.submit(node, n, limits, sampling, keys)
        self._asked |= dict.fromkeys(tickets, node)
        return tickets

    def step(self) -> list[tuple[int, Rollout]]:
        """One decode loop of the model; before it, paths without room end with nothing drawn, by "length"."""
        if self._full:
            none = Rollout(np.zeros(0, np.int32), np.zeros(0, np.float32), "length", self.version)
            full, self._full = self._full, []
            for ticket in full:
                del self._asked[ticket]
            return [(ticket, none) for ticket in full]
        found = self._engine.step()
        return [(ticket, self._step_of(self._asked.pop(ticket), one)) for ticket, one in found]

    def _step_of(self, node: int, rollout: Rollout) -> Rollout:
        """The step that was drawn, as ids of `tokens`; its log-prob is spread evenly where they are not those drawn."""
        own, reason = rollout.token_ids.tolist(), rollout.stop_reason
        text = decode(self._own, own)
        step = first_step(text, GRAMMAR.stops)
        whole = not step or not text[len(step) :].strip()
        if self._same and whole:
            return rollout
        ids = encode_after(self._tokens, step or text).tolist()
        if step:
            reason = "stop"
        elif reason == "eos":
            ids.append(self._tokens.im_end)
        if not whole:  # a mark spelt in a way that did not stop it: what follows was not asked for
            own = encode_after(self._own, step).tolist()
        self._drawn.setdefault(node, {})[tuple(ids)] = own
        even = np.full(len(ids), rollout.log_probs.sum() / max(len(ids), 1), np.float32)
        return Rollout(np.asarray(ids, np.int32), even, reason, self.version)

    def counters(self) -> dict[str, float]:
        return self._engine.counters()


def same_tokenizer(first: Tokens, second: Tokens) -> bool:
    """Whether ids of one are ids of the other."""
    same = lambda read: read(first.tokenizer) == read(second.tokenizer)
    return same(lambda one: one.get_vocab()) and same(lambda one: one.encode(few_shot_start()))
