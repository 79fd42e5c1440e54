"""Many prompts through one engine: the loop every task that samples shares."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from smallmath_jax.models.qwen_vl import QwenVL
from smallmath_jax.parallel import hosts
from smallmath_jax.records import Prompt, Sampling
from smallmath_jax.rollout.engine import Engine, Limits, Rollout
from smallmath_jax.tasks.policy import Policy, compute_dtype


@dataclasses.dataclass(frozen=True)
class Request:
    """`n` samples of one prompt; `keys` name their draws (law 5)."""

    prompt: Prompt
    keys: np.ndarray  # uint32 [n, 2]
    limits: Limits
    sampling: Sampling


def sampling_of(settings: Any) -> Sampling:
    """Sampling of a config's fields."""
    return Sampling(settings.temperature, settings.top_p, settings.top_k)


def make_engine(policy: Policy, config: Any, slots: int = 0, pages: int = 0) -> Engine:
    """An engine with its own copy of the weights in the compute dtype; `slots` and `pages` in place of the config's."""
    return Engine(
        policy.config,
        engine_weights(policy.model, config),
        slots=slots or config.engine.slots,
        cache_length=config.engine.cache_length,
        prefill_chunk=config.engine.prefill_chunk,
        decode_steps=config.engine.decode_steps,
        eos_ids=policy.tokens.eos_ids,
        banned_ids=policy.tokens.banned_ids,
        pad_id=policy.tokens.pad_id,
        image_settings=policy.images,
        max_patches=config.vision.max_patches,
        compute_dtype=compute_dtype(config),
        pages=pages or config.engine.pages,
    )


def engine_weights(model: QwenVL, config: Any) -> QwenVL:
    """The engine's own copy of the weights, on this host's devices: the trainer donates its own at each step."""
    chips = math.gcd(config.engine.tensor_parallel, jax.local_device_count())
    return hosts.local_copy(model, compute_dtype(config), chips)


def run_requests(
    engine: Engine,
    requests: Iterable[Request],
    on_tokens: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, list[Rollout]]]:
    """Yields (request index, its rollouts in key order) as each request finishes.

    Only about two slots' worth of work is in flight at a time, so that thousands of prompts need no more cache
    than dozens. A request that can never fit raises ValueError before anything is sampled for it.
    """
    waiting = iter(enumerate(requests))
    owner: dict[int, tuple[int, int]] = {}  # ticket -> (request index, sample)
    partial: dict[int, list[Rollout | None]] = {}
    roots: dict[int, int] = {}
    exhausted = False
    while True:
        while not exhausted and len(owner) < 2 * engine.slots:
            entry = next(waiting, None)
            if entry is None:
                exhausted = True
                break
            index, request = entry
            roots[index] = engine.root(request.prompt)
            partial[index] = [None] * len(request.keys)
            tickets = engine.submit(
                roots[index], len(request.keys), request.limits, request.sampling, request.keys
            )
            owner.update({ticket: (index, sample) for sample, ticket in enumerate(tickets)})
        if not owner:
            return
        found = engine.step()
        hosts.beat("sampling")
        for ticket, rollout in found:
            index, sample = owner.pop(ticket)
            partial[index][sample] = rollout
            if on_tokens is not None:
                on_tokens(len(rollout.token_ids))
            if all(entry is not None for entry in partial[index]):
                engine.prune(roots.pop(index))
                yield index, partial.pop(index)


class Clock:
    """Seconds spent per phase of a step, for the log."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
