"""A local model of another vocabulary as round 1's policy: what it reads, what it draws, and how that travels."""

import asyncio
import dataclasses
import pathlib
import sys
from types import SimpleNamespace

import chain_case
import driver_case as case
import numpy as np
import pytest

from smallmath_jax.data.few_shot import few_shot_prompt, few_shot_start
from smallmath_jax.data.prompts import GRAMMARS, stop_sequences
from smallmath_jax.data.tokens import decode, encode_after, load_tokens
from smallmath_jax.records import Problem, Sampling
from smallmath_jax.rollout.engine import Limits, Rollout
from smallmath_jax.rollout.programs import MAX_STOPS
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.tasks.driver import Driver
from smallmath_jax.tasks.local import LocalEngine, same_tokenizer
from smallmath_jax.tasks.policy import load_policy, make_mesh
from smallmath_jax.tasks.rollouts import make_engine
from smallmath_jax.tasks.search import search_job

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from configs import evolve as config_module  # noqa: E402

TEXT = load_tokens("tiny")  # marks are text to it
MARKED = case.TOKENS  # marks are tokens of their own
STOPS = GRAMMARS["code_steps"].stops
PROBLEM = Problem("p", "What is 3+4?", "7")
KEYS = np.zeros((1, 2), np.uint32)


class Inner:
    """Has what LocalEngine calls of an Engine; draws what it is told to."""

    slots = 4

    def __init__(self, length=1000):
        self.cache_length, self.paths, self.waiting = length, {}, {}
        self.answer, self.limits = None, None

    def root(self, prompt):
        return self._add((), prompt.token_ids)

    def append(self, node, ids):
        return self._add(self.paths[node], ids)

    def _add(self, before, ids):
        self.paths[len(self.paths)] = (*before, *map(int, ids))
        return len(self.paths) - 1

    def submit(self, node, n, limits, sampling, keys):
        self.limits = limits
        self.waiting |= {ticket: node for ticket in range(10, 10 + n)}
        return list(range(10, 10 + n))

    def step(self):
        done, self.waiting = list(self.waiting), {}
        return [(ticket, self.answer) for ticket in done]

    def prune(self, node):
        return {node}


def drawn(own, text, reason="stop"):
    ids = encode_after(own, text).astype(np.int32)
    return Rollout(ids, np.full(len(ids), -0.5, np.float32), reason, 0)


def engine_of(inner, own, tokens, start="Examples.\n"):
    return LocalEngine(inner, own, own.tokenizer.encode(start), tokens, [PROBLEM], 400)


def asked(engine, node):
    (ticket,) = engine.submit(node, 1, Limits(16), Sampling(), KEYS)
    ((back, rollout),) = engine.step()
    assert back == ticket
    return rollout


PROMPT = case.prompt("p")


def test_steps_of_another_vocabulary_are_encoded_once_and_its_own_ids_are_read_again():
    inner = Inner()
    engine = engine_of(inner, TEXT, MARKED)
    root = engine.root(PROMPT)
    assert TEXT.tokenizer.decode(inner.paths[root]) == "Examples.\nQuestion: What is 3+4?\n"
    inner.answer = drawn(TEXT, "<code>\nx=3\n<end_of_step>\n")
    step = asked(engine, root)
    assert inner.limits.stop == stop_sequences(TEXT, GRAMMARS["code_steps"])
    assert step.stop_reason == "stop"
    assert step.token_ids.tolist() == encode_after(MARKED, "<code>\nx=3\n<end_of_step>").tolist()
    assert step.log_probs.sum() == pytest.approx(-0.5 * len(inner.answer.token_ids))
    node = engine.append(root, step.token_ids)
    assert inner.paths[node] == inner.paths[root] + tuple(inner.answer.token_ids)
    output = encode_after(MARKED, "\n<output>3<end_of_output>")
    shown = engine.append(node, output)  # the model never drew it: its text is encoded
    assert TEXT.tokenizer.decode(inner.paths[shown]).endswith(
        "<end_of_step>\n\n<output>3<end_of_output>"
    )
    engine.prune(shown)
    assert len(engine._lengths) == 3


def test_what_follows_a_mark_is_cut_and_an_end_is_an_end():
    inner = Inner()
    engine = engine_of(inner, TEXT, MARKED)
    root = engine.root(PROMPT)
    inner.answer = drawn(TEXT, "x=3\n<end_of_code> and so on", "length")
    step = asked(engine, root)
    assert decode(MARKED, step.token_ids) == "x=3\n<end_of_code>" and step.stop_reason == "stop"
    node = engine.append(root, step.token_ids)
    assert TEXT.tokenizer.decode(inner.paths[node]).endswith("\nx=3\n<end_of_code>")
    inner.answer = drawn(TEXT, "so \\boxed{3}", "eos")
    step = asked(engine, root)
    assert step.stop_reason == "eos" and step.token_ids[-1] == MARKED.im_end
    inner.answer = drawn(TEXT, "x=", "length")
    assert asked(engine, root).stop_reason == "length"


def test_ids_of_the_same_tokenizer_travel_unchanged():
    other = load_tokens("tiny")
    assert same_tokenizer(TEXT, other) and not same_tokenizer(TEXT, MARKED)
    inner = Inner()
    engine = engine_of(inner, TEXT, other)
    root = engine.root(PROMPT)
    pieces = [TEXT.tokenizer.encode(part)[0] for part in ("x", "=", "3")]  # no canonical spelling
    mark = encode_after(TEXT, "<end_of_step>").tolist()
    ids = np.asarray([*pieces, *TEXT.tokenizer.encode("\n"), *mark], np.int32)
    inner.answer = Rollout(ids, np.zeros(len(ids), np.float32), "stop", 0)
    assert asked(engine, root) is inner.answer
    assert inner.paths[engine.append(root, ids)] == inner.paths[root] + tuple(ids)


def test_a_path_without_room_ends_at_once():
    inner = Inner()
    engine = engine_of(inner, TEXT, MARKED)
    root = engine.root(PROMPT)
    inner.cache_length = len(inner.paths[root]) + 3
    inner.answer = drawn(TEXT, "x=3", "length")
    asked(engine, root)
    assert inner.limits.max_tokens == 3
    node = engine.append(root, encode_after(MARKED, "x=3 and more"))
    found = asked(engine, node)
    assert len(found.token_ids) == 0 and found.stop_reason == "length"


def test_the_prompt_is_cut_where_problems_begin_to_differ():
    for shots in (0, 1, 2):
        start = few_shot_start(shots)
        assert few_shot_prompt(PROBLEM, "x", shots) == f"{start}Question: What is 3+4?\nx"
        assert start.count("<output>") == 1 + shots  # once in the instructions
    with pytest.raises(ValueError, match="has pictures"):
        few_shot_prompt(dataclasses.replace(PROBLEM, images=(b"x",)))


def test_stops_in_text_are_as_many_as_an_engine_takes():
    stops = stop_sequences(TEXT, GRAMMARS["code_steps"])
    assert 3 <= len(stops) <= MAX_STOPS
    assert not any(one != two and two[: len(one)] == one for one in stops for two in stops)


def test_a_search_over_a_real_engine():
    """The model knows one program (`chain_case`), marks as tokens; the policy reads marks as text."""
    config = config_module.get_config("tiny")
    config.engine.update({"slots": 4, "cache_length": 160})
    model = chain_case.chained(load_policy(config, make_mesh(config)))
    engine = engine_of(make_engine(model, config), model.tokens, TEXT)
    driver = Driver(
        SimpleNamespace(tokens=TEXT),
        engine,
        case.HOST,
        grammar="code_steps",
        sampling=Sampling(),
        max_tokens=40,
    )
    trees = []
    settings = SearchSettings(rollouts=2, candidates=4)
    asyncio.run(driver.run([search_job(driver, PROBLEM, PROMPT, settings)], 1, trees.append))
    (tree,) = trees
    assert tree.stopped != "failed", tree.extra
    steps = {node.text.partition("\n<output>")[0] for node in tree.nodes if node.kind == "open"}
    assert steps <= {f"<code>print(3+{n})<end_of_code>" for n in (4, 5)} and steps
    answers = [node for node in tree.nodes if node.kind == "answer"]
    assert answers and {node.answer for node in answers} <= {"7", "8"}
    for node in tree.nodes[1:]:
        assert decode(TEXT, node.token_ids) == node.text
        assert node.log_prob < 0
