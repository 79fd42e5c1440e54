"""Pictures all the way: from a problem through prompt, search, preference model and the stored tree.

The model is a tiny random one with weights wide enough that a picture makes a difference. What search and preference
model say is compared with one plain forward pass over the whole sequence. Prompts of search, fine-tuning and preference
model are one.
"""

import base64
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_configs import load

from smallmath_jax.data.images import token_index, vision_row
from smallmath_jax.models.qwen_vl import forward, head_matrix
from smallmath_jax.models.tree import map_named
from smallmath_jax.models.value_head import add_value_head
from smallmath_jax.records import PreferencePair, Problem, read_parts
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.steps import CODE_END, STEP_END, CodeResult
from smallmath_jax.search.tree import path_to
from smallmath_jax.search.vote import scale_of
from smallmath_jax.tasks import evolve_stages, judged, policy, ppm
from smallmath_jax.tasks import search as task
from smallmath_jax.tasks.driver import Driver, Host
from smallmath_jax.tasks.tree_parts import read_trees
from smallmath_jax.train.loop import StopSignal

SETTINGS = SearchSettings(rollouts=3, candidates=4, max_depth=4, max_errors=9, guidance="ppm")
LENGTH = 128


def drawn(shape):
    """A picture file: one filled shape on white."""
    canvas, buffer = Image.new("RGB", (56, 56), "white"), io.BytesIO()
    getattr(ImageDraw.Draw(canvas), shape)((6, 6, 50, 50), fill="black")
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def problem(shape, name="shape"):
    return Problem(id=name, problem="How many <image> corners?", answer="4", images=(drawn(shape),))


@dataclasses.dataclass
class World:
    """The policy, its judge, and the config they were made by."""

    config: object
    policy: policy.Policy
    judge: policy.Policy
    driver: Driver


async def run_program(prefix, code):
    return CodeResult("ok", "7\n")


@pytest.fixture(scope="module")
def world():
    config = load("evolve", "tiny")
    config.engine.slots = 8
    config.in_flight = 0
    found = policy.load_policy(config, policy.make_mesh(config))
    rng = np.random.default_rng(0)  # a fresh tiny model's blocks are the identity: nothing to tell
    noise = lambda _, leaf: leaf + jnp.asarray(0.15 * rng.normal(size=leaf.shape), leaf.dtype)
    digits = [found.tokens.tokenizer.encode(digit)[0] for digit in "0123456789"]
    writes = {*digits, found.tokens.step_ids[STEP_END], found.tokens.step_ids[CODE_END]}
    banned = np.array([row for row in range(found.tokens.vocab_rows) if row not in writes])
    tokens = dataclasses.replace(found.tokens, banned_ids=banned)
    found = dataclasses.replace(found, tokens=tokens, model=map_named(noise, found.model))
    headed = add_value_head(found.model, jax.random.key(1))
    judge = dataclasses.replace(found, model=headed)
    engine = task.make_engine(found, config)
    host = Host(run_program, lambda problem, answer: "wrong")
    scorer = task.make_judge(judge, config, scale_of("ppm"))
    driver = Driver(found, engine, host, judge=scorer, **task.drawing(config))
    return World(config, found, judge, driver)


def searched(world, folder, *problems):
    """The trees of problems as a run stores them."""
    with StopSignal() as stop:
        task.grow_trees(world.driver, problems, SETTINGS, folder, world.config, stop=stop)
    assert list(read_parts(folder))
    return read_trees([folder])


def prompt_of(world, problem):
    (kept,), (prompt,), left_out = policy.prompts_for([problem], world.policy, world.config)
    assert not left_out
    return policy.with_pixels(prompt, kept, world.policy)


@jax.jit
def hidden_of(model, tokens, positions, vision):
    return forward(model, tokens, positions, jnp.ones_like(tokens), vision)[0]


def plain(world, model, prompt, ids):
    """float64 [len(prompt) + len(ids), D]: final hidden states by one forward pass without any cache."""
    count = len(prompt.token_ids)
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : count + len(ids)] = [*prompt.token_ids, *ids]
    after = prompt.next_position + np.arange(LENGTH)
    positions = np.concatenate([prompt.positions, np.tile(after, (3, 1))], axis=1)[None, :, :LENGTH]
    images, patches = world.policy.images, world.config.vision.max_patches
    vision = vision_row(prompt.pixels, prompt.grids, patches, images)
    marks = world.policy.tokens
    vision["token_index"] = token_index(tokens[0], marks.image_id, marks.video_id)
    vision = {name: array[None] for name, array in vision.items()}
    states = hidden_of(model, tokens, positions.astype(np.int32), vision)
    return np.asarray(states, np.float64)[: count + len(ids)]


def log_probs(world, prompt, ids):
    """float64 [len(ids)], over the tokens that may be drawn, by the plain pass."""
    states = plain(world, world.policy.model, prompt, ids)[len(prompt.token_ids) - 1 : -1]
    logits = states @ np.asarray(head_matrix(world.policy.model), np.float64).T
    logits[:, world.policy.tokens.banned_ids] = -np.inf
    logits -= logits.max(axis=1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[range(len(ids)), ids]


def value(world, prompt, ids):
    """tanh(value / 5) behind the last token, by the plain pass and the head's own numbers."""
    head, state = world.judge.model.value_head, plain(world, world.judge.model, prompt, ids)[-1]
    kernel, bias = (np.asarray(part, np.float64) for part in (head.kernel, head.bias))
    return float(np.tanh((state @ kernel + bias)[0] / 5))


@pytest.fixture(scope="module")
def trees(world, tmp_path_factory):
    """One problem text under two pictures, each searched on its own with the same keys."""
    root = tmp_path_factory.mktemp("trees")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "KEPT_PIXEL_BYTES", 0)  # pictures are read at the search itself
        return {
            shape: searched(world, root / shape, problem(shape))[0]
            for shape in ("rectangle", "ellipse")
        }


def told(tree):
    return [(node.tag, node.token_ids, node.kind) for node in tree.nodes]


def test_the_same_text_under_another_picture_gives_another_tree(world, trees, tmp_path):
    assert told(trees["rectangle"]) != told(trees["ellipse"])
    assert all(len(tree.nodes) > 8 for tree in trees.values())
    again = searched(world, tmp_path, problem("rectangle"))[0]
    assert told(again) == told(trees["rectangle"])


def test_log_probs_and_scores_are_those_of_a_plain_pass(world, trees):
    prompts = {shape: prompt_of(world, problem(shape)) for shape in trees}
    other = {"rectangle": "ellipse", "ellipse": "rectangle"}
    scored = 0
    for shape, tree in trees.items():
        for node in tree.nodes[1:6]:
            before = [token for step in path_to(tree, node.parent) for token in step.token_ids]
            ids, start = before + node.token_ids, len(before)
            written = slice(start, start + node.written)
            found = log_probs(world, prompts[shape], ids)[written].sum()
            assert node.log_prob == pytest.approx(found, abs=2e-4)
            wrong = log_probs(world, prompts[other[shape]], ids)[written].sum()
            assert abs(wrong - found) > 1e-2, "the other picture must make a difference"
            if node.score is not None:
                scored += 1
                assert node.score == pytest.approx(value(world, prompts[shape], ids), abs=1e-4)
                assert abs(value(world, prompts[other[shape]], ids) - node.score) > 1e-3
    assert scored >= 4


def test_the_stored_tree_gives_its_picture_back(world, trees, tmp_path):
    """Preference models are trained from stored trees alone."""
    for shape, tree in trees.items():
        (link,) = tree.images
        assert base64.b64decode(link.partition("base64,")[2]) == drawn(shape)
        again, first = prompt_of(world, ppm.problem_of(tree)), prompt_of(world, problem(shape))
        np.testing.assert_array_equal(again.token_ids, first.token_ids)
        np.testing.assert_array_equal(again.positions, first.positions)
        np.testing.assert_array_equal(again.pixels, first.pixels)
    path = tmp_path / "figure.png"
    path.write_bytes(drawn("ellipse"))
    on_disk = dataclasses.replace(problem("rectangle"), images=(str(path),))
    stored = ppm.problem_of(task.described(trees["rectangle"], on_disk, world.driver))
    first = prompt_of(world, problem("ellipse"))
    np.testing.assert_array_equal(prompt_of(world, stored).pixels, first.pixels)


def test_search_fine_tuning_and_preference_model_read_one_prompt(world, trees, tmp_path):
    """Ids of the search's root are the start of what is learnt and judged; only the grammar's answer follows them."""
    given, tree = problem("rectangle"), trees["rectangle"]
    roots = []
    opened = lambda prompt: roots.append(prompt) or Driver.open(world.driver, prompt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.driver, "open", opened)
        searched(world, tmp_path, given)
    root = roots[0].token_ids.tolist()
    steps = path_to(tree, tree.nodes[-1].tag)
    ids = [token for step in steps for token in step.token_ids]
    row = {"problem_id": given.id, "token_ids": ids, "written": [1] * len(ids)}
    ((_, lesson),) = evolve_stages.lessons_of([row], {given.id: given}, world.policy, world.config)
    pair = PreferencePair(given.id, ids[:2], ids[2:], ids[2:4], 1, 1, 1.0, "step")
    (item,), _, dropped = judged.judged_items(
        world.judge, [ppm.problem_of(tree)], [pair], [], world.config
    )
    (path,) = item.sequences  # the rejected side is a beginning of the chosen one
    assert not dropped and len(root) > 5
    for sequence in (lesson, path):
        assert sequence.token_ids[: len(root)].tolist() == root
        np.testing.assert_array_equal(sequence.positions[:, : len(root)], roots[0].positions)
        assert not sequence.weights[: len(root)].any()
        assert sequence.token_ids[len(root) :].tolist()[: len(ids)] == ids
    assert [place + 1 - len(root) for _, place in item.ends] == [len(ids), 4]
