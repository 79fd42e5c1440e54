"""A scripted engine for the driver's tests: steps of tiny programs, drawn by key, finished in an order of its own."""

import random

import numpy as np
from search_case import run_snippet

from smallmath_jax.data.prompts import GRAMMARS
from smallmath_jax.data.tokens import add_step_tokens, encode_after, load_tokens
from smallmath_jax.records import Problem, Prompt
from smallmath_jax.rollout.engine import Rollout
from smallmath_jax.tasks.driver import Host

TOKENS = add_step_tokens(load_tokens("tiny"), GRAMMARS["code_steps"].marks)


class Policy:
    tokens = TOKENS


class ScriptedEngine:
    """Has what a driver calls of an Engine. A completion is a function of its key and path; its time is not."""

    def __init__(self, seed=0, slots=8, cache_length=400):
        self.slots, self.cache_length, self.version = slots, cache_length, 3
        self.paths, self.parents = {}, {}
        self.waiting, self.decoded = {}, 0
        self.most = 0  # requests waiting at the same time
        self.order = random.Random(seed)

    def root(self, prompt):
        return self._add(None, ())

    def append(self, node, ids):
        return self._add(node, self.paths[node] + tuple(int(one) for one in ids))

    def _add(self, parent, path):
        node = len(self.parents)
        self.paths[node], self.parents[node] = path, parent
        return node

    def prune(self, node):
        gone = {node}
        for one in sorted(self.paths):
            if one in gone or self.parents[one] in gone:
                gone.add(one)
                del self.paths[one]
        self.waiting = {t: request for t, request in self.waiting.items() if request[0] not in gone}

    def submit(self, node, n, limits, sampling, keys):
        assert limits.max_tokens >= 1 and keys.shape == (n, 2)
        tickets = [self.decoded + len(self.waiting) + 10_000 * k for k in range(1, n + 1)]
        while any(ticket in self.waiting for ticket in tickets):
            tickets = [ticket + 1 for ticket in tickets]
        self.waiting.update({t: (node, key) for t, key in zip(tickets, keys, strict=True)})
        self.most = max(self.most, len(self.waiting))
        return tickets

    def step(self):
        ready = self.order.sample(sorted(self.waiting), min(self.slots, len(self.waiting)))
        done = []
        for ticket in ready:
            node, key = self.waiting.pop(ticket)
            self.decoded += 1
            done.append((ticket, self._drawn(self.paths[node], key)))
        return done

    def scores(self, nodes):
        return [(sum(self.paths[node]) % 21 - 10) / 5.0 for node in nodes]

    def counters(self):
        names = ("decode_steps", "decode_seconds", "prefill_seconds")
        return dict.fromkeys(names, 0) | {"decoded_tokens": self.decoded}

    def _drawn(self, path, key):
        source = random.Random(f"{key.tolist()} {path}")
        text = next_step(TOKENS.tokenizer.decode(list(path)), source)
        ids = encode_after(TOKENS, text)
        log_probs = np.full(len(ids), -source.random(), np.float32)
        return Rollout(ids.astype(np.int32), log_probs, "stop", self.version)


def next_step(text, source):
    """Two or three assignments, one of them maybe broken, then a print, then the answer that was printed."""
    if "<end_of_output>" in text:
        printed = text.rpartition("<output>")[2].partition("<")[0]
        return f"\n<answer>\\boxed{{{printed}}}<end_of_answer>"
    lead = "" if text else "<code>"
    if text.count("<end_of_step>") < 2:
        value = source.choice(["3", "4", "5", "y"])
        return f"{lead}\nx={value}<end_of_step>"
    return "\nprint(x)\n<end_of_code>"


def problem(name, gold="4"):
    return Problem(id=name, problem=f"What is {name}?", answer=gold)


def prompt(name):
    ids = np.arange(5, dtype=np.int32)
    return Prompt(name, name, ids, np.tile(ids, (3, 1)), 5)


async def run_program(prefix, code):
    return run_snippet(prefix, code)


def grade(problem, answer):
    return "correct" if answer == problem.answer else "wrong"


HOST = Host(run_program, grade, "test")
