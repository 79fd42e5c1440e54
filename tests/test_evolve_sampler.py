"""The ablation of SFT data: baselines from plain samples of the same policy, as many as a search takes rollouts."""

import types

import driver_case as case
import pytest
from test_configs import load

from smallmath_jax.records import Sampling, read_parts
from smallmath_jax.search.select import trajectories
from smallmath_jax.tasks import evolve, evolve_stages
from smallmath_jax.tasks import search as task
from smallmath_jax.tasks.driver import Driver
from smallmath_jax.tasks.tree_parts import read_trees

PROBLEMS = [case.problem(f"p{number}") for number in range(24)]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    given = lambda problems, policy, config: (problems, [case.prompt(p.id) for p in problems], {})
    monkeypatch.setattr(task, "prompts_for", given)
    monkeypatch.setattr(task, "with_pixels", lambda prompt, problem, policy: prompt)
    config = load("evolve", "tiny")
    config.evolve.update({"rollouts": (6, 6, 6, 6), "more_from": 1, "more": (9,), "control": False})
    never = types.SimpleNamespace(requested=False, exit_code=143)
    folder = lambda number: tmp_path / f"round_{number}"
    return types.SimpleNamespace(config=config, host=case.HOST, stop=never, round_folder=folder)


def searched(bench, sampler, selection):
    """The trees of round 1, those of more rollouts standing in for the first, and the SFT rows chosen from them."""
    bench.config.evolve.update({"sampler": sampler, "selection": selection})
    driver = Driver(
        case.Policy(),
        case.ScriptedEngine(),
        case.HOST,
        grammar="code_steps",
        sampling=Sampling(),
        max_tokens=16,
    )
    evolve_stages._search_round(bench, 1, driver, PROBLEMS)
    folder = bench.round_folder(1)
    first = read_trees([folder / "search" / "trees"])
    more = read_trees([folder / "search" / "more_9"])
    evolve_stages.select_stage(bench, 1, PROBLEMS)
    return first, more, list(read_parts(folder / "select" / "sft"))


@pytest.mark.parametrize("selection", ["rejection", "random"])
def test_the_baselines_draw_from_plain_samples(bench, selection):
    first, more, rows = searched(bench, "chains", selection)
    assert len(first) == len(PROBLEMS) and more
    right = {}
    for trees, count in ((first, 6), (more, 9)):
        for tree in trees:
            ways = trajectories(tree)
            assert tree.rollouts == len(ways) == count, (
                "as many trajectories as a search's rollouts"
            )
            parents = [node.parent for node in tree.nodes[1:]]
            assert parents.count("0") == count
            assert all(parents.count(tag) == 1 for tag in parents if tag != "0"), "no way branches"
            assert not any(node.score is not None for node in tree.nodes)
            right[tree.problem_id] = {way.text: way.outcome == "correct" for way in ways}
    before = {tree.problem_id: [way.text for way in trajectories(tree)] for tree in first}
    for tree in more:  # the first trajectories are drawn once more, by the same keys
        assert [way.text for way in trajectories(tree)][:6] == before[tree.problem_id]
    chosen = [right[row["problem_id"]][row["text"]] for row in rows]
    assert len(chosen) > 5
    assert all(chosen) if selection == "rejection" else 0 < sum(chosen) < len(chosen)


def test_a_search_of_as_many_rollouts_filters_what_it_draws(bench):
    """What the baselines must not be drawn from: siblings are distinct, and a rollout starts where another was."""
    first, _, _ = searched(bench, "mcts", "step_verified")
    branching = [node.parent for tree in first for node in tree.nodes[1:]]
    assert all(tree.rollouts <= 6 for tree in first)
    assert any(tree.extra["duplicates"] for tree in first) and len(branching) > len(set(branching))


def test_what_does_not_fit_is_refused():
    config = load("evolve", "tiny")
    config.evolve.sampler = "chains"
    with pytest.raises(ValueError, match="choose 'rejection' or 'random'"):
        evolve.check(config)
    config.evolve.selection = "rejection"
    evolve.check(config)
    assert evolve_stages.round_settings(config, 4).guidance == "terminal"
    config.evolve.sampler = "chain"
    with pytest.raises(ValueError, match="known are mcts, chains"):
        evolve.check(config)
