"""Asynchronous and lock-step search under the benchmark's virtual clock: the same trees, and known times."""

import dataclasses

import pytest

from benchmarks.scheduling import asynchronous, compare, same_shapes
from benchmarks.virtual_time import (
    Costs,
    Shape,
    made_trees,
    make_world,
    prompt_of,
    replay,
    run_virtual,
)
from smallmath_jax.search.settings import SearchSettings

SETTINGS = SearchSettings(rollouts=3, candidates=3)
SHAPE = Shape(slots=8, cache_length=512, workers=2, max_tokens=64)
FREE = Costs(decode=1.0, prefill=0.0, fill=0.0)


@pytest.mark.parametrize("guidance", ["terminal", "ppm"])
def test_both_schedules_give_the_stored_trees(guidance):
    settings = dataclasses.replace(SETTINGS, guidance=guidance)
    stored = made_trees(6, settings)
    for lengths in (None, lambda key: 1 + int(key[0]) % 40):
        found = compare(replay(stored, lengths), settings, SHAPE, Costs(), lambda _: 0.02, 6)
        assert same_shapes(found.trees, stored)  # and compare has seen that both are equal
        for measures in (found.asynchronous, found.lock_step):
            assert 0 < measures["occupancy_of_all"] < measures["occupancy"] <= 1
    assert sum(len(tree.nodes) for tree in stored) > 60


def test_a_problem_alone_takes_as_long_either_way():
    stored = made_trees(1, SETTINGS)
    found = compare(replay(stored), SETTINGS, SHAPE, FREE, lambda _: 0.5)
    assert found.ratio == pytest.approx(1.0)
    # By hand: its expansions one after the other, each as long as its longest step, then as its programs on 2 workers
    (tree,), programs, seconds = stored, set(), 0.0
    for tag in {node.parent for node in tree.nodes[1:]}:
        children = [node for node in tree.nodes[1:] if node.parent == tag]
        seconds += max(child.written for child in children) / 1000
        seconds += -(-sum(bool(child.status) for child in children) // 2) * 0.5
        programs |= {child.text for child in children if child.status}
    assert found.asynchronous["seconds"] == pytest.approx(seconds)
    assert found.asynchronous["workers"] == pytest.approx(len(programs) * 0.5 / seconds / 2)


def test_a_slow_problem_delays_only_itself():
    """One problem whose programs take 50 times as long."""
    stored = made_trees(8, SETTINGS)
    slow, recorded = set(replay(stored[:1]).results), replay(stored)
    times = lambda program: 1.0 if program in slow else 0.02
    shape = dataclasses.replace(SHAPE, workers=16)
    asked = [(problem, prompt_of(problem)) for problem in recorded.problems]
    ended = []
    for some in (asked, asked[:1], asked[1:]):
        world = make_world(recorded, shape, FREE, times)
        run_virtual(world.clock, lambda: asynchronous(world.driver, some, SETTINGS, 8))  # noqa: B023
        last = [done for one, done in world.workers._known.items() if one not in slow]
        ended.append((world.clock.now, max(last, default=0.0)))
    (whole, others), (alone, _), (_, undisturbed) = ended
    assert alone <= whole < 1.02 * alone
    assert undisturbed <= others < 1.1 * undisturbed < alone / 4


def test_slow_steps_here_and_there_cost_lock_step_far_more():
    """One step in twelve is 50 tokens long, anywhere: in lock-step every round has one."""
    stored = made_trees(16, SETTINGS)
    long = lambda key: 50 if int(key[0]) % 12 == 0 else 1
    shape = dataclasses.replace(SHAPE, slots=48)
    found = compare(replay(stored, long), SETTINGS, shape, FREE, lambda _: 0.0, in_flight=16)
    assert found.ratio > 1.5
    assert found.asynchronous["occupancy"] > 1.5 * found.lock_step["occupancy"]
    assert found.asynchronous["tokens"] == found.lock_step["tokens"]


def test_a_step_that_does_not_fit_is_said():
    stored = made_trees(1, SETTINGS)
    shape = dataclasses.replace(SHAPE, max_tokens=4)
    with pytest.raises(ValueError, match="longer than the cache has room for"):
        compare(replay(stored), SETTINGS, shape, FREE, lambda _: 0.0)
