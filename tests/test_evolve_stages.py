"""The stages of a round over scripted searches: what they read and write, retry, resume, and do on two hosts."""

import dataclasses
import json
import re
import signal
import time

import driver_case as case
import pytest
import stage_case
from test_parallel_hosts import start_two_hosts

from smallmath_jax.data.tiny import tiny_problems
from smallmath_jax.records import read_parts
from smallmath_jax.search import select
from smallmath_jax.search.mcts import search_seeds
from smallmath_jax.search.pairs import PairSettings, preference_pairs
from smallmath_jax.tasks import evolve, tree_parts
from smallmath_jax.tasks import evolve_stages as stages
from smallmath_jax.tasks.recheck import relabel
from smallmath_jax.tasks.tree_parts import find_trees, read_trees

PROBLEMS = [case.problem(f"p{number}") for number in range(30)]


@pytest.fixture(autouse=True)
def no_prompts(monkeypatch):
    stage_case.without_prompts(monkeypatch.setattr)


def searched(folder, number=1, problems=PROBLEMS, **fields):
    bench = stage_case.make_bench(folder, stage_case.config_of(**fields))
    return bench, stages.search_stage(bench, number, None, None, problems)


def rows_of(folder):
    return list(read_parts(folder))


def test_selection_is_that_of_all_trees_at_once(tmp_path, monkeypatch):
    """The rules, applied to a round read whole, in order of problem and seed."""
    monkeypatch.setattr(tree_parts, "PART_TREES", 4)
    monkeypatch.setattr(tree_parts, "SORTED_ROWS", 5)
    bench, _ = searched(tmp_path, number=2, more_seeds=2)
    (tmp_path / "round_2" / "select" / "sft").mkdir(parents=True)  # of a start that was cut short
    (tmp_path / "round_2" / "select" / "sft" / "00009-0000000.jsonl").write_text("{}\n")
    found = stages.select_stage(bench, 2, PROBLEMS)
    folder = tmp_path / "round_2" / "search"
    trees = read_trees([folder / "trees", folder / "more_4"])
    groups = {
        tree.problem_id: [t for t in trees if t.problem_id == tree.problem_id] for tree in trees
    }
    assert len(trees) > len(groups) == 30 and list(groups) == sorted(groups)
    best = [one for group in groups.values() for one in stages.trajectories_of(group, bench.config)]
    lessons = rows_of(tmp_path / "round_2" / "select" / "sft")
    assert [row["text"] for row in lessons] == [one.text for one in best] and len(best) > 5
    medium = [t for g in groups.values() if select.difficulty(g) == "medium" for t in g]
    settings = PairSettings(**bench.config.pairs.to_dict())
    pairs = [pair for tree in medium for pair in preference_pairs(tree, settings)[0]]
    kept = rows_of(tmp_path / "round_2" / "select" / "pairs")
    assert kept == [dataclasses.asdict(pair) for pair in pairs] and len(pairs) > 5
    assert found["solved_ids"] == [
        name for name in groups if any(map(stages.has_right, groups[name]))
    ]
    assert found["asked_ids"] == list(groups)
    assert (found["sft_examples"], found["pairs_kept"]) == (len(best), len(pairs))
    assert found["nodes"] == sum(len(tree.nodes) for tree in trees)
    assert found["problems"] == found["easy"] + found["medium"] + found["hard"] == 30
    assert found["by_stop"] == {
        reason: sum(tree.stopped == reason for tree in trees) for reason in found["by_stop"]
    }


def test_lucky_answers_are_found_once_and_kept(tmp_path, monkeypatch):
    embedded = tiny_problems("train", 30, 0)  # only these can be drawn again with other numbers
    embedded = [
        dataclasses.replace(one, id=like.id) for one, like in zip(embedded, PROBLEMS, strict=True)
    ]
    bench, _ = searched(tmp_path)
    bench.config.evolve.instances = 2
    folder = tmp_path / "round_1" / "search"
    trees, ran = read_trees([folder / "trees"]), []
    right = [tree for tree in trees if stages.has_right(tree)]
    lucky = {tree.problem_id for tree in right[::2]}

    def check(some, problems, host, instances):
        ran.extend(tree.problem_id for tree in some)
        tags = lambda tree: [n.tag for n in tree.nodes if n.verdict == "correct"]
        bad = [tags(tree) if tree.problem_id in lucky else [] for tree in some]
        after = [relabel(tree, one) for tree, one in zip(some, bad, strict=True)]
        return after, {"right_answers": len(some), "lucky": sum(map(bool, bad))}

    monkeypatch.setattr("smallmath_jax.tasks.evolve_checks.recheck", check)
    (folder / "checks" / "trees.json").unlink()
    by_id = {one.id: one for one in embedded}
    left = stages._unsolved(bench, folder, ["trees"], by_id)
    solved = {tree.problem_id for tree in right} - lucky
    assert {one.id for one in left} == set(by_id) - solved
    found = stages.select_stage(bench, 1, embedded)
    assert set(found["solved_ids"]) == solved and found["lucky"] == len(lucky)
    assert sorted(ran) == sorted(tree.problem_id for tree in right)  # each once, the others never
    # What an outcome model reads of the round: the same labels
    taught = {
        tree.problem_id: stages.has_right(tree)
        for tree in stages.labelled_trees(bench, tmp_path / "round_1", embedded)
    }
    assert taught == {name: name in solved for name in by_id}
    # Trees that came later are checked, whatever was kept of others
    parts = "".join(part.read_text() for part in (folder / "trees").glob("*-host*.jsonl"))
    later = re.sub(r'("problem_id": ?")p', r"\1q", parts)
    (folder / "trees" / "later.jsonl").write_text(later)
    renamed = {"q" + one.id[1:]: one for one in embedded}
    stages._unsolved(bench, folder, ["trees"], by_id | renamed)
    assert {name for name in ran if name[0] == "q"} == {"q" + one.problem_id[1:] for one in right}


def test_what_a_round_leaves_unsolved_is_searched_twice(tmp_path):
    _, record = searched(tmp_path, second_pass=True)
    folder = tmp_path / "round_1" / "search"
    first = find_trees([folder / "trees"])
    left = {one.problem_id for one in first if not one.right}
    again = find_trees([folder / stages.SECOND])
    assert 0 < len(left) < 30 and {one.problem_id for one in again} == left
    assert {one.seed for one in again} == {search_seeds(0, 2)[1]} != {one.seed for one in first}
    assert record["unsolved_first"] == record["tried_twice"] == len(left)
    assert record["solved_by_second_pass"] == sum(one.right > 0 for one in again)
    bench, _ = searched(tmp_path / "off", second_pass=False)
    assert not (tmp_path / "off" / "round_1" / "search" / stages.SECOND).exists()


def test_more_rollouts_go_on_with_the_tree_of_each_seed(tmp_path):
    """A second seed that was searched in the second pass is not searched from its start again."""
    bench, _ = searched(tmp_path, number=2, second_pass=True, more_seeds=2)
    folder = tmp_path / "round_2" / "search"
    more = {(one.problem_id, one.seed): one for one in read_trees([folder / "more_4"])}
    before = read_trees([folder / "trees", folder / stages.SECOND])
    before = [one for one in before if (one.problem_id, one.seed) in more]
    assert {one.seed for one in before} == set(search_seeds(0, 2))
    for one in before:
        longer = more[one.problem_id, one.seed].nodes[: len(one.nodes)]
        assert [node.tag for node in longer] == [node.tag for node in one.nodes]


def test_a_stage_of_failures_is_not_finished(tmp_path):
    async def broken(prefix, code):
        raise OSError("the server is gone")

    host = dataclasses.replace(case.HOST, run_program=broken)
    bench = stage_case.make_bench(tmp_path, host=host)
    with pytest.raises(RuntimeError, match="30 of 30 searches failed .* tries them again"):
        stages.search_stage(bench, 1, None, None, PROBLEMS)
    _, record = searched(tmp_path)
    assert record["failed"] == 0
    assert find_trees([tmp_path / "round_1" / "search" / "trees"])[0].stopped != "failed"


@pytest.mark.parametrize("broken", ["control", "more_4"])
def test_failures_behind_earlier_trees_are_seen(tmp_path, monkeypatch, broken):
    """The tree that a failed one was to go on from is still there, and the control stands in for none."""
    grow = stages.grow_trees

    def failing(driver, problems, settings, folder, *rest, **options):
        host = dataclasses.replace(case.HOST, run_program=refused)
        driver.host = host if folder.name == broken else case.HOST
        return grow(driver, problems, settings, folder, *rest, **options)

    async def refused(prefix, code):
        raise OSError("the sandbox is gone")

    monkeypatch.setattr(stages, "grow_trees", failing)
    with pytest.raises(RuntimeError, match=f"round 2 search {broken}: .* searches failed"):
        searched(tmp_path, number=2, control=True)
    monkeypatch.undo()
    stage_case.without_prompts(monkeypatch.setattr)
    _, record = searched(tmp_path, number=2, control=True)
    assert record["failed"] == 0


@pytest.mark.parametrize(("share", "old"), [(0.0, 0), (0.25, 2), (0.05, 0)])
def test_old_problems_take_no_more_than_their_share(tmp_path, share, old):
    bench = stage_case.make_bench(tmp_path, stage_case.config_of(per_round=8, old_share=share))
    folder = tmp_path / "round_1" / "select"
    folder.mkdir(parents=True)
    asked = [one.id for one in PROBLEMS[:10]]
    (folder / "done.json").write_text(json.dumps({"asked_ids": asked, "solved_ids": asked[:1]}))
    found = [one.id for one in evolve.round_problems(bench, 2, PROBLEMS)]
    assert len(found) == len(set(found)) == 8 and len(set(found) & set(asked)) == old


def test_a_folder_that_is_not_there_is_told_before_anything_is_trained():
    config = stage_case.config_of()
    config.bootstrap.model = "/nowhere/at-all"
    with pytest.raises(FileNotFoundError, match="/nowhere/at-all: no such folder"):
        evolve.check(config)


def test_only_embedded_problems_are_shared_with_the_bootstrap(tmp_path):
    mine = [case.problem(f"mine-{number}") for number in range(40)]
    assert not any(map(evolve.is_bootstraps, mine))
    embedded = list(map(evolve.is_bootstraps, tiny_problems("train", 40, 0)))
    assert True in embedded and False in embedded


def test_coverage_is_told_by_level_or_by_set(tmp_path):
    """NuminaMath states no level, but where it took a problem from; MetaMath's are MATH's."""
    of = lambda number, **fields: dataclasses.replace(PROBLEMS[number], **fields)
    olympiad = {"source": "AI-MO/NuminaMath-1.5::train", "licence": "Apache-2.0"}
    problems = [
        *(of(n, meta={"source": "olympiads"}, **olympiad) for n in range(10)),
        *(of(n, source="o/plain-set") for n in range(10, 20)),
        *(of(n, level=4) for n in range(20, 30)),
    ]
    bench, _ = searched(tmp_path, problems=problems)
    found = stages.select_stage(bench, 1, problems)
    cells = evolve.coverage_so_far(bench, 1)["coverage_by_level"]
    assert set(cells) == {"olympiads", "plain-set", "level 4"}
    assert all(cell["n"] == 10 for cell in cells.values())
    assert sum(cell["accuracy"] * 10 for cell in cells.values()) == len(found["solved_ids"])
    row = next(row for row in rows_of(tmp_path / "round_1" / "select" / "sft") if row["origin"])
    assert (row["source"], row["origin"], row["licence"]) == (
        olympiad["source"], "olympiads", "Apache-2.0",
    )  # fmt: skip


# ---- two hosts


HOSTS = """
import sys, time
import driver_case as case, stage_case
from smallmath_jax.parallel import hosts
from smallmath_jax.tasks import evolve_stages as stages
from smallmath_jax.train import loop

loop.EXCHANGE_SECONDS = 0.3
stage_case.without_prompts()
hosts.initialize()
index = hosts.host_index()
folder, slow = sys.argv[1], sys.argv[2] == "slow"

class Engine(case.ScriptedEngine):
    def step(self):
        time.sleep(0.2 if slow and index else 0.0)  # host 0 has nothing left long before host 1
        return super().step()

with loop.StopSignal() as stop:
    config = stage_case.config_of(second_pass=True, more_seeds=2)
    bench = stage_case.make_bench(folder, config, stop, Engine(slots=4))
    problems = [case.problem(f"p{n}") for n in range(30)]
    hosts.barrier("ready")
    stages.search_stage(bench, 2, None, None, problems)
    if index:
        time.sleep(0.5)  # arrives after host 0 has written what it writes
    stages.select_stage(bench, 2, problems)
    stages.select_stage(bench, 2, problems)
hosts.barrier("end")
print("host", index, "good")
"""


@pytest.mark.full
def test_two_hosts_stop_together_and_go_on(tmp_path):
    """SIGTERM reaches one: both end with its code, and the same command gives what one host alone gives."""
    workers = start_two_hosts(HOSTS, tmp_path / "two", "slow")
    try:
        trees = tmp_path / "two" / "round_2" / "search" / "trees"
        deadline = time.monotonic() + 120
        while not list(trees.glob("*-host0.jsonl")) and time.monotonic() < deadline:
            assert [worker.poll() for worker in workers] == [None, None]
            time.sleep(0.1)
        workers[1].send_signal(signal.SIGTERM)
        told = [worker.communicate(timeout=60)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [143, 143], told
    assert "stopped, finished trees are saved" in told[0]
    before = rows_of(trees)
    assert 0 < len(before) < 30

    workers = start_two_hosts(HOSTS, tmp_path / "two", "fast")
    try:
        told = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], told
    bench, _ = searched(tmp_path / "one", number=2, second_pass=True, more_seeds=2)
    stages.select_stage(bench, 2, PROBLEMS)
    two, one = tmp_path / "two" / "round_2", tmp_path / "one" / "round_2"
    for name in ("trees", stages.SECOND, "more_4"):
        assert len(rows_of(two / "search" / name)) == len(rows_of(one / "search" / name))
        assert read_trees([two / "search" / name]) == read_trees([one / "search" / name])
    for name in ("sft", "pairs"):  # whole problems, in one order over both hosts
        assert rows_of(two / "select" / name) == rows_of(one / "select" / name)
        assert len(list((two / "select" / name).glob("*.jsonl"))) == 2
    ours, theirs = (stages.manifest(one / "select"), stages.manifest(two / "select"))
    assert ours | {"wall_s": 0} == theirs | {"wall_s": 0}
