"""The rollout engine: a KV cache that is a tree, as an API.

    root(prompt) -> node                append(node, token_ids) -> node     score(node) -> value
    submit(node, n, limits, sampling, keys) -> tickets     step() -> [(ticket, rollout)]     cancel(ticket)
    fork / extend: blocking wrappers    prune(node)                         set_weights(params, version)

A GRPO group is a depth-1 tree, a search a deep one, an image prompt a root. Under it: nodes are tokens; their keys and
values are made when first needed, in pages (`cache`), and copied into a slot when a completion starts. Slots decode
together in compiled loops of several steps (`programs`); between loops finished rows leave and waiting ones enter.
A draw depends on (key, token index) and the path alone, never on slot, neighbours or order (law 5).
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from smallmath_jax.data.images import ImageSettings, token_index
from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.qwen_vl import QwenVL
from smallmath_jax.models.tree import bits_digest
from smallmath_jax.records import Prompt, Sampling
from smallmath_jax.rollout import programs
from smallmath_jax.rollout.pool import Pool, Programs, mesh_of
from smallmath_jax.rollout.programs import MAX_STOP_LENGTH, MAX_STOPS

_ROWS = 8  # slots are padded to a multiple: matrix kernels treat rows left over differently, and a bit may differ


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a completion ends besides EOS. A stop sequence is matched in drawn tokens only, and stays in them."""

    max_tokens: int
    stop: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A finished completion. log_probs are those of the distribution each token was drawn from (law 2)."""

    token_ids: np.ndarray  # int32 [N], EOS or stop sequence included
    log_probs: np.ndarray  # float32 [N]
    stop_reason: str  # eos | stop | length
    version: int  # of the weights that drew it


@dataclasses.dataclass(frozen=True)
class _Request:
    node: int
    limits: Limits
    sampling: Sampling
    key: np.ndarray  # uint32 [2]


class Engine:
    """One model's engine. Not thread-safe; one call at a time.

    Args:
        config: the model's shape.
        params: its weights; copied in `compute_dtype`, on the devices and mesh they lie on.
        slots: completions decoded together.
        cache_length: tokens a path and its completion may have together.
        prefill_chunk: tokens of a page and of a prefill row.
        decode_steps: tokens drawn between two looks at the queue.
        eos_ids: each ends a completion.
        banned_ids: never drawn, and no part of any log-prob (vision tokens, unused vocabulary rows).
        pad_id: fills unused places of a prefill row; never read.
        image_settings, max_patches: how images are cut, and the patches a root may have.
        version: of `params`; stored with every rollout.
        pages: pages of the pool (0: half of what the slots hold); fewer are evicted and made again more often.
        prefill_rows: pages computed in one call (0: about 512 tokens).
    """

    def __init__(
        self,
        config: ModelConfig,
        params: QwenVL,
        *,
        slots: int,
        cache_length: int,
        prefill_chunk: int,
        decode_steps: int,
        eos_ids: Sequence[int],
        banned_ids: Sequence[int] | np.ndarray,
        pad_id: int,
        image_settings: ImageSettings | None,
        max_patches: int,
        compute_dtype: Any = jnp.float32,
        version: int = 0,
        pages: int = 0,
        prefill_rows: int = 0,
    ):
        if min(slots, cache_length, prefill_chunk, decode_steps) < 1:
            raise ValueError(
                "slots, cache_length, prefill_chunk and decode_steps must be at least 1"
            )
        row_pages = -(-cache_length // prefill_chunk)
        mesh = mesh_of(params)
        rows = _ROWS * (mesh.shape["data"] if mesh is not None else 1)
        self.slots, self.cache_length = slots, cache_length
        self._shape = programs.Shape(
            config=config,
            slots=-(-slots // rows) * rows,
            cache_length=row_pages * prefill_chunk,
            chunk=prefill_chunk,
            pages=max(row_pages, pages or slots * row_pages // 2),
            prefill_rows=prefill_rows or max(1, 512 // prefill_chunk),
            decode_steps=decode_steps,
            dtype=jnp.dtype(compute_dtype).name,
            mesh=mesh,
        )
        self._banned = _banned_rows(banned_ids, config.text.vocab_size)
        self._eos = np.asarray(sorted(eos_ids), np.int32)
        self._max_patches = max_patches
        self._programs = Programs()
        self._pool = Pool(self._shape, self._programs.run, pad_id, image_settings, max_patches)
        self._tree = self._pool.tree
        self._next_ticket = 0
        self._waiting: dict[int, _Request] = {}  # by ticket, first come first served
        self._asked: dict[int, set[int]] = {}  # node -> its tickets that wait or run
        self._running: list[tuple[int, _Request] | None] = [None] * slots
        self._drawn: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(slots)]
        self._finished: dict[int, Rollout] = {}
        self._rows = programs.idle_rows(self._shape.slots)
        self._counts = dict.fromkeys(
            ("decoded_tokens", "decode_steps", "decode_calls", "cancelled", "restarted"), 0
        )
        self._decode_seconds = 0.0
        self.set_weights(params, version)

    # ---- the tree

    def root(self, prompt: Prompt) -> int:
        """A node of a whole prompt, with its images. Nothing is computed before something asks for it.

        Raises ValueError when the prompt is empty, ends in an image, has more patches than a row, or has images the
        model cannot see.
        """
        ids = np.asarray(prompt.token_ids, np.int32)
        self._check_tokens(ids, f"prompt of problem {prompt.problem_id!r}")
        config = self._shape.config
        seen = token_index(ids, config.image_token_id, config.video_token_id) >= 0
        if seen.any() or prompt.pixels is not None:
            self._check_images(prompt, seen)
        positions = np.asarray(prompt.positions, np.int32)
        images = prompt if seen.any() else None
        return self._tree.add(None, ids, positions, int(prompt.next_position), images)

    def append(self, node: int, token_ids: np.ndarray | Sequence[int]) -> int:
        """A child of `node` with given text tokens (the output of a program, another model's step).

        Raises ValueError for no tokens, tokens outside the vocabulary and image tokens.
        """
        parent = self._tree[node]
        ids = np.asarray(token_ids, np.int32).reshape(-1)
        self._check_tokens(ids, f"tokens appended to node {node}")
        config = self._shape.config
        if (token_index(ids, config.image_token_id, config.video_token_id) >= 0).any():
            raise ValueError(
                f"tokens appended to node {node} hold image tokens; images enter by root()"
            )
        after = parent.next_position + len(ids)
        positions = np.broadcast_to(np.arange(parent.next_position, after), (3, len(ids)))
        return self._tree.add(node, ids, positions.astype(np.int32), after)

    def prune(self, node: int) -> set[int]:
        """Forgets `node` and all below it, and frees their pages; completions under way there are cancelled.

        Returns the nodes that went.
        """
        gone = self._pool.remove(node)
        for ticket in [ticket for one in gone for ticket in self._asked.get(one, ())]:
            self.cancel(ticket)
        return gone

    def score(self, node: int) -> float:
        """The value head's reading at the last token of `node`, before any tanh.

        Siblings that nobody has computed yet are computed in the same call. Raises ValueError without a value head.
        """
        return self.scores([node])[0]

    def scores(self, nodes: Sequence[int]) -> list[float]:
        """`score` of many nodes, computed together in as few calls as they need."""
        if not self._pool.has_values:
            raise ValueError(
                "score() needs a model with a value head; this one has none (models.value_head adds it)"
            )
        for node in nodes:
            self._check_length(node, 0)
        parents = dict.fromkeys(self._tree[node].parent for node in nodes)
        siblings = {
            one: None
            for parent in parents
            if parent is not None
            for one in sorted(self._tree[parent].children)
            if self._tree[one].end <= self.cache_length
        }
        while left := [node for node in dict.fromkeys(nodes) if self._tree[node].value is None]:
            self._pool.ensure(left, [one for one in siblings if one not in left])
        return [self._tree[node].value for node in nodes]

    # ---- completions

    def submit(
        self, node: int, n: int, limits: Limits, sampling: Sampling, keys: np.ndarray
    ) -> list[int]:
        """Asks for n completions of the path to `node`; row i of keys uint32 [n, 2] names the draws of the i-th.

        Returns a ticket each. Raises ValueError, before anything is queued, for what can never be served.
        """
        self._check_length(node, limits.max_tokens)
        _check_request(n, limits, sampling)
        keys = np.asarray(keys, np.uint32)
        if keys.shape != (n, 2):
            raise ValueError(
                f"keys must be uint32 [n, 2] = [{n}, 2], got {keys.shape}; see records.draw_key"
            )
        tickets = list(range(self._next_ticket, self._next_ticket + n))
        self._next_ticket += n
        self._asked.setdefault(node, set()).update(tickets)
        for ticket, key in zip(tickets, keys, strict=True):
            self._waiting[ticket] = _Request(node, limits, sampling, key)
        return tickets

    def step(self) -> list[tuple[int, Rollout]]:
        """Lets waiting requests in, runs one decode loop, and returns what is finished (maybe nothing)."""
        if not self._finished:
            self._advance()
        done, self._finished = list(self._finished.items()), {}
        return done

    def drain(self) -> list[tuple[int, Rollout]]:
        """Steps until nothing is left to do."""
        done = []
        while self._finished or self._waiting or any(self._running):
            done.extend(self.step())
        return done

    def cancel(self, ticket: int) -> None:
        """Drops a completion that waits, runs or is finished but not handed out; else does nothing."""
        if not 0 <= ticket < self._next_ticket:
            raise ValueError(f"ticket {ticket} was never given out")
        if self._finished.pop(ticket, None) is not None:
            self._counts["cancelled"] += 1
        if request := self._waiting.pop(ticket, None):
            self._left(ticket, request.node)
            self._counts["cancelled"] += 1
        for slot, entry in enumerate(self._running):
            if entry is not None and entry[0] == ticket:
                self._release(slot)
                self._left(ticket, entry[1].node)
                self._counts["cancelled"] += 1

    def fork(
        self, node: int, n: int, limits: Limits, sampling: Sampling, keys: np.ndarray
    ) -> list[tuple[int, Rollout]]:
        """n children of `node`, each holding a completion; blocks. What else finishes is kept for step()."""
        tickets = self.submit(node, n, limits, sampling, keys)
        while not all(ticket in self._finished for ticket in tickets):
            self._advance()
        rollouts = [self._finished.pop(ticket) for ticket in tickets]
        return [(self.append(node, rollout.token_ids), rollout) for rollout in rollouts]

    def extend(
        self, node: int, limits: Limits, sampling: Sampling, key: np.ndarray
    ) -> tuple[int, Rollout]:
        """One child of `node` holding a completion, drawn under key uint32 [2]; blocks."""
        return self.fork(node, 1, limits, sampling, np.asarray(key, np.uint32)[None])[0]

    def set_weights(self, params: QwenVL, version: int) -> None:
        """New weights: every page and value is dropped; nodes stay, as tokens.

        Completions under way start again from their first token, so that each comes from one version.
        """
        restarted = {}
        for slot, entry in enumerate(self._running):
            if entry is not None:
                restarted[entry[0]] = entry[1]
                self._release(slot)
        self._counts["restarted"] += len(restarted)
        self._waiting = dict(sorted((restarted | self._waiting).items()))
        run, shape = self._programs.run, self._shape
        self._weights = self._slots = None  # make room first
        self._pool.reset(None, None)
        self._weights = run(programs.prepare, shape, params, self._banned, self._eos)
        # Zeros, and not the old numbers behind a mask: NaN of diverged weights would come through one
        self._slots, pages = run(programs.make_caches, shape)
        self._pool.reset(self._weights, pages)
        self.version = version

    def weights_digest(self) -> str:
        """Names the policy that samples: equal for the same weights to the bit, whatever devices hold them."""
        return bits_digest(self._weights)

    def counters(self) -> dict[str, float]:
        """Totals since the engine was made; `nodes`, `pages`, `waiting` and `running` are of this moment.

        prefilled_tokens are computed ones, unique_tokens those of them that were not computed before under the same
        weights; occupancy is decoded_tokens over slots x decode_steps; tokens_per_second counts drawn tokens over the
        time spent in prefill and decode; recompilations are those of programs that had run before.
        """
        counts: dict[str, float] = dict(self._counts)
        pool, seconds = self._pool, self._decode_seconds + self._pool.seconds
        counts |= {
            "prefilled_tokens": pool.prefilled_tokens,
            "unique_tokens": pool.unique_tokens,
            "prefill_calls": pool.prefill_calls,
            "prefill_seconds": pool.seconds,
            "decode_seconds": self._decode_seconds,
            "compilations": self._programs.compilations,
            "recompilations": self._programs.recompilations,
            "nodes": len(self._tree.nodes),
            "pages": self._tree.pages_in_use,
            "waiting": len(self._waiting),
            "running": sum(entry is not None for entry in self._running),
        }
        row_steps = counts["decode_steps"] * self.slots
        counts["occupancy"] = counts["decoded_tokens"] / max(row_steps, 1)
        counts["tokens_per_second"] = counts["decoded_tokens"] / seconds if seconds else 0.0
        return counts

    # ---- under the API

    def _advance(self) -> None:
        """Lets waiting requests into free slots, then runs one decode loop."""
        self._admit()
        active = int(self._rows.active.sum())
        if not active:
            return
        started = time.perf_counter()
        # With others waiting it pays to stop as soon as an eighth of the slots is free
        leave = active - max(1, self.slots // 8) if self._waiting else 0
        self._slots, out = self._programs.run(
            programs.decode,
            self._shape,
            self._weights,
            self._slots,
            self._rows,
            np.int32(max(leave, 0)),
        )
        self._collect(programs.Decoded(*map(np.asarray, out)))
        self._decode_seconds += time.perf_counter() - started
        self._counts["decode_calls"] += 1

    def _admit(self) -> None:
        free = [slot for slot, entry in enumerate(self._running) if entry is None]
        if not free or not self._waiting:
            return
        queue = iter(self._waiting.items())
        first = list(itertools.islice(queue, len(free)))
        wanted = [request.node for _, request in first]
        ready = set(self._pool.ensure(wanted, (request.node for _, request in queue)))
        taken = []
        for ticket, request in first:
            if request.node in ready:
                slot = free.pop(0)
                taken.append((slot, request.node))
                self._occupy(slot, ticket, self._waiting.pop(ticket))
        self._slots = self._pool.fill(self._slots, taken)

    def _occupy(self, slot: int, ticket: int, request: _Request) -> None:
        node, rows = self._tree[request.node], self._rows
        self._running[slot] = (ticket, request)
        self._drawn[slot] = []
        rows.active[slot] = True
        rows.last[slot] = node.token_ids[
            -1
        ]  # its keys and values are written once more by the first step
        rows.length[slot] = node.end - 1
        rows.position[slot] = node.positions[0, -1]
        rows.count[slot] = 0
        rows.limit[slot] = request.limits.max_tokens
        rows.keys[slot] = request.key
        rows.temperature[slot] = request.sampling.temperature
        rows.top_k[slot] = request.sampling.top_k
        rows.top_p[slot] = request.sampling.top_p
        rows.recent[slot] = -1
        rows.stops[slot] = -1
        for number, stop in enumerate(request.limits.stop):
            rows.stops[slot, number, -len(stop) :] = stop

    def _collect(self, out: programs.Decoded) -> None:
        """Takes over what a decode loop drew; finished rows leave their slots."""
        rows = self._rows
        drawn = np.where(rows.active, out.count - rows.count, 0)
        self._counts["decoded_tokens"] += int(drawn.sum())
        self._counts["decode_steps"] += int(out.steps)
        for slot in np.flatnonzero(rows.active):
            count, (ticket, request) = drawn[slot], self._running[slot]
            ids, log_probs = out.tokens[:count, slot], out.log_probs[:count, slot]
            self._drawn[slot].append((ids, log_probs))
            rows.last[slot] = ids[-1]
            rows.recent[slot] = np.concatenate([rows.recent[slot], ids])[-MAX_STOP_LENGTH:]
            reason = out.reason[slot]
            if reason != programs.RUNNING:
                parts = zip(*self._drawn[slot], strict=True)
                ids, log_probs = (np.concatenate(part) for part in parts)
                name = programs.REASONS[reason]
                self._finished[ticket] = Rollout(ids, log_probs, name, self.version)
                self._release(slot)
                self._left(ticket, request.node)
        rows.count[:] += drawn
        rows.length[:] += drawn
        rows.position[:] += drawn

    def _left(self, ticket: int, node: int) -> None:
        """A ticket of `node` neither waits nor runs any more."""
        self._asked[node].discard(ticket)
        if not self._asked[node]:
            del self._asked[node]

    def _release(self, slot: int) -> None:
        self._running[slot] = None
        self._drawn[slot] = []
        self._rows.active[slot] = False
        self._rows.temperature[slot] = 0.0  # an idle row must not ask for noise, top-k or top-p
        self._rows.top_k[slot] = 0
        self._rows.top_p[slot] = 1.0

    def _check_tokens(self, ids: np.ndarray, what: str) -> None:
        rows = self._shape.config.text.vocab_size
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"{what}: need a list of at least one token, got shape {ids.shape}")
        if ids.min() < 0 or ids.max() >= rows:
            wrong = ids[(ids < 0) | (ids >= rows)][0]
            raise ValueError(f"{what}: token {wrong} is outside the model's {rows} vocabulary rows")

    def _check_images(self, prompt: Prompt, seen: np.ndarray) -> None:
        name = f"prompt of problem {prompt.problem_id!r}"
        if self._shape.config.vision is None:
            raise ValueError(
                f"{name} has images, but family {self._shape.config.family!r} has no vision tower"
            )
        if seen[-1]:
            raise ValueError(f"{name} ends in an image token; text must follow the last image")
        patches = 0 if prompt.pixels is None else len(prompt.pixels)
        if patches > self._max_patches:
            raise ValueError(
                f"{name} has {patches} patches, max_patches is {self._max_patches}: raise it or lower max_pixels"
            )
        if patches != 4 * seen.sum():
            raise ValueError(
                f"{name} has {seen.sum()} image tokens for {patches} patches, need one for four"
            )

    def _check_length(self, node: int, more: int) -> None:
        length = self._tree[node].end
        if length + more > self.cache_length:
            raise ValueError(
                f"node {node}: {length} tokens and {more} new ones need a cache of {length + more}, cache_length is "
                f"{self.cache_length}; raise it, or lower max_tokens"
            )


def _check_request(n: int, limits: Limits, sampling: Sampling) -> None:
    if n < 1 or limits.max_tokens < 1:
        raise ValueError(f"need n >= 1 and max_tokens >= 1, got {n} and {limits.max_tokens}")
    if len(limits.stop) > MAX_STOPS or any(
        not 1 <= len(one) <= MAX_STOP_LENGTH for one in limits.stop
    ):
        raise ValueError(
            f"at most {MAX_STOPS} stop sequences of 1 to {MAX_STOP_LENGTH} tokens each, got lengths "
            f"{[len(one) for one in limits.stop]}"
        )
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ValueError(f"temperature {sampling.temperature} must be finite and >= 0 (0: greedy)")
    if not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        raise ValueError(
            f"need 0 < top_p <= 1 and top_k >= 0, got {sampling.top_p} and {sampling.top_k}"
        )


def _banned_rows(banned_ids: Sequence[int] | np.ndarray, vocabulary: int) -> np.ndarray:
    """bool [V]; ids past the vocabulary are ignored."""
    banned = np.zeros(vocabulary, bool)
    ids = np.asarray(banned_ids, np.int64)
    banned[ids[ids < vocabulary]] = True
    return banned
