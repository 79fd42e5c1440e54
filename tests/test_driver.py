"""The driver: trees do not depend on what runs beside them, slots stay full, failures stay where they happen."""

import asyncio
import dataclasses
import json
from types import SimpleNamespace

import driver_case as case
import numpy as np
import pytest
import stage_case

from smallmath_jax.records import Sampling, read_parts
from smallmath_jax.search.mcts import search
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.tree import tree_from_json
from smallmath_jax.search.vote import SCALES
from smallmath_jax.tasks import identity, tree_parts
from smallmath_jax.tasks import search as task
from smallmath_jax.tasks.driver import Driver, Judge, Meter, open_host, same_answer
from smallmath_jax.verify.sandbox import SandboxSettings

SETTINGS = SearchSettings(rollouts=4, candidates=3, max_depth=6)
NAMES = [f"p{number}" for number in range(9)]


def make_driver(engine, host=case.HOST, judge=None):
    return Driver(
        case.Policy(),
        engine,
        host,
        grammar="code_steps",
        sampling=Sampling(),
        max_tokens=16,
        judge=judge,
    )


def searched(driver, names, settings, in_flight, stop=lambda: False):
    """Trees by problem, through the driver."""
    trees = {}

    def job(name):
        async def grow():
            problem, root = case.problem(name), driver.open(case.prompt(name))
            try:
                callables = driver.callables(problem, settings)
                return await search(problem, root, settings=settings, **callables)
            finally:
                driver.close(root)

        return grow

    take = lambda tree: trees.__setitem__(tree.problem_id, tree)
    whole = asyncio.run(driver.run(map(job, names), in_flight, take, stop))
    return trees, whole


@pytest.mark.parametrize("guidance", ["terminal", "ppm"])
def test_trees_are_those_of_searches_one_after_the_other(guidance):
    settings = dataclasses.replace(SETTINGS, guidance=guidance)
    judge = lambda: Judge(case.ScriptedEngine(), SCALES["ppm"]) if guidance == "ppm" else None
    alone, _ = searched(make_driver(case.ScriptedEngine(1), judge=judge()), NAMES, settings, 1)
    for seed, in_flight in ((2, 4), (3, 100)):
        engine = case.ScriptedEngine(seed)
        beside, whole = searched(make_driver(engine, judge=judge()), NAMES, settings, in_flight)
        assert whole and beside == alone
    assert engine.most >= 9 * settings.candidates  # all problems asked before any was answered
    assert not engine.paths and not engine.waiting  # and nothing is left behind
    solved = [tree for tree in alone.values() if any(n.verdict == "correct" for n in tree.nodes)]
    errors = [node for tree in alone.values() for node in tree.nodes if node.kind == "error"]
    assert solved and errors
    if guidance == "ppm":
        assert any(node.score is not None for tree in alone.values() for node in tree.nodes)


def test_a_problem_that_fails_fails_alone():
    async def fragile(prefix, code):
        if "=5" in prefix and "=5" in code:
            raise OSError("the pipe is gone")
        return await case.run_program(prefix, code)

    alone, _ = searched(make_driver(case.ScriptedEngine()), NAMES, SETTINGS, 4)
    host = dataclasses.replace(case.HOST, run_program=fragile)
    trees, _ = searched(make_driver(case.ScriptedEngine(), host), NAMES, SETTINGS, 4)
    failed = {name for name, tree in trees.items() if tree.stopped == "failed"}
    assert failed and failed != set(NAMES)
    assert all("the pipe is gone" in trees[name].extra["failure"] for name in failed)
    assert all(trees[name] == alone[name] for name in set(NAMES) - failed)


def test_a_step_that_a_server_fails_ends_its_search_alone_whatever_comes_back_later():
    alone, _ = searched(make_driver(case.ScriptedEngine()), NAMES, SETTINGS, 4)
    engine = case.ScriptedEngine(slots=1)
    step, failed = engine.step, []

    def failing():
        done = step()
        if not failed and done:
            failed.append(done[0][0])
            done[0] = (done[0][0], OSError("the server is gone"))
        return done

    engine.step = failing
    engine.prune = lambda node: None  # so that the other samples of that step do come back
    driver = make_driver(engine)
    trees, whole = searched(driver, NAMES, SETTINGS, 4)
    lost = [name for name in NAMES if trees[name].stopped == "failed"]
    assert whole and len(lost) == 1 and "the server is gone" in trees[lost[0]].extra["failure"]
    assert all(trees[name] == alone[name] for name in NAMES if name not in lost)
    assert not driver._owners


def test_what_breaks_between_searches_ends_them_all():
    async def broken(prefix, code):
        loop = asyncio.get_running_loop()
        loop.call_soon(_raise)
        await loop.create_future()

    host = dataclasses.replace(case.HOST, run_program=broken)
    with pytest.raises(RuntimeError, match="sandbox has failed"):
        searched(make_driver(case.ScriptedEngine(), host), NAMES, SETTINGS, 4)


def _raise():
    raise RuntimeError("the sandbox has failed")


def test_a_driver_runs_again_after_waiting_for_programs():
    async def slow(prefix, code):
        await asyncio.sleep(0.01)
        return await case.run_program(prefix, code)

    driver = make_driver(case.ScriptedEngine(), dataclasses.replace(case.HOST, run_program=slow))
    first, _ = searched(driver, NAMES[:2], SETTINGS, 2)
    second, _ = searched(driver, NAMES[:2], SETTINGS, 2)
    assert first == second


def test_a_path_without_room_ends_there():
    tree = searched(make_driver(case.ScriptedEngine(cache_length=14)), ["p0"], SETTINGS, 1)[0]["p0"]
    assert tree.stopped == "exhausted" and not any(n.kind == "answer" for n in tree.nodes)


def test_equal_answers():
    assert same_answer("1/2", "0.5") and not same_answer("3", "4")


# ---- parts and resumption


class Stop:
    """Asks to stop once `after` trees are counted."""

    exit_code = 143

    def __init__(self, after):
        self.asked, self.after = 0, after

    @property
    def requested(self):
        self.asked += 1
        return self.asked > self.after


@pytest.fixture
def no_prompts(monkeypatch):
    stage_case.without_prompts(monkeypatch.setattr)
    monkeypatch.setattr(tree_parts, "PART_TREES", 2)


def grow(
    folder,
    stop,
    engine=None,
    searches=1,
    settings=SETTINGS,
    host=case.HOST,
    watchdog_s=0,
    **more,
):
    problems = [case.problem(name) for name in NAMES]
    driver = make_driver(engine or case.ScriptedEngine(), host)
    config = SimpleNamespace(in_flight=3, watchdog_s=watchdog_s)
    task.grow_trees(
        driver, problems, settings, folder, config, stop=stop, searches=searches, **more
    )
    return {(row["problem_id"], row["seed"]): row for row in read_parts(folder)}


def test_killed_and_continued_no_problem_is_lost_or_done_twice(tmp_path, no_prompts):
    whole = grow(tmp_path / "whole", Stop(10**9), searches=2)
    assert len(whole) == 18
    for round_number in range(40):
        try:
            grow(tmp_path / "cut", Stop(25), case.ScriptedEngine(round_number), searches=2)
        except SystemExit as left:
            assert left.code == 143
        else:
            break
    assert round_number > 1
    rows = list(read_parts(tmp_path / "cut"))
    assert len(rows) == 18
    assert {(row["problem_id"], row["seed"]): row for row in rows} == whole
    parts = sorted(path.name for path in (tmp_path / "cut").glob("*.jsonl"))
    assert parts[0] == "00000-host0.jsonl" and len(parts) >= 9


def test_a_tree_that_goes_on_is_the_one_searched_at_once(tmp_path, no_prompts):
    short = grow(tmp_path / "short", Stop(10**9))
    long = dataclasses.replace(SETTINGS, rollouts=9)
    trees = {key: tree_from_json(row) for key, row in short.items()}
    earlier = lambda name, seed: trees.get((name, seed))
    further = grow(tmp_path / "further", Stop(10**9), settings=long, earlier=earlier)
    at_once = grow(tmp_path / "once", Stop(10**9), settings=long)
    assert further == at_once
    both = grow(tmp_path / "seeds", Stop(10**9), searches=2, settings=long, earlier=earlier)
    assert {key: row for key, row in both.items() if key in further} == further and len(both) == 18
    trees = tree_parts.read_trees([tmp_path / "short", tmp_path / "further"])
    assert [tree.problem_id for tree in trees] == sorted(NAMES)
    assert all(tree.rollouts == further[tree.problem_id, 0]["rollouts"] for tree in trees)


def test_pages_and_summary(tmp_path, no_prompts):
    grow(tmp_path / "trees", Stop(10**9))
    record = task.finish(tmp_path / "trees", tmp_path)
    assert record["problems"] == 9 and 0 < record["coverage"] <= 1
    assert json.loads((tmp_path / "summary.json").read_text()) == record
    assert (tmp_path / "report" / "trees" / "index.html").exists()


def test_keys_name_the_draws():
    engine = case.ScriptedEngine()
    rollouts = [engine._drawn((), key) for key in np.arange(8, dtype=np.uint32).reshape(4, 2)]
    assert len({tuple(one.token_ids) for one in rollouts}) > 1


def test_a_server_has_no_occupancy():
    """Its decode steps and slots are its own."""
    counters = {
        "decode_steps": 0,
        "decoded_tokens": 0,
        "decode_seconds": 0.0,
        "prefill_seconds": 0.0,
    }
    engine = SimpleNamespace(slots=16, counters=lambda: dict(counters))
    meter = Meter(engine)
    counters.update(decoded_tokens=1000, decode_seconds=2.0)
    assert meter.shown() == {"tok/s": 500.0}
    counters.update(decode_steps=100)
    assert meter.shown() == {"occupancy": 1000 / 1600, "tok/s": 500.0}


def test_trees_of_other_weights_are_not_added_to(tmp_path):
    named = {"source": "runs/a, step 3", "weights": "1234", "judge": None}
    identity.keep_or_refuse(tmp_path, named)
    identity.keep_or_refuse(tmp_path, named | {"source": "a copy of it"})
    for other in ({"weights": "5678"}, {"judge": "5678"}):
        with pytest.raises(ValueError, match="drawn by other weights .*a copy of it.* --workdir"):
            identity.keep_or_refuse(tmp_path, named | other)


def test_what_the_sandbox_lacks_is_told(capsys):
    with open_host({"workers": 1, "modules": ("mpmath", "sympyy"), "tier": "T2"}):
        pass
    assert "sandbox: sympyy cannot be imported" in capsys.readouterr().out


@pytest.mark.parametrize(("field", "value"), [("workers", -1), ("cpu_seconds", 0.0)])
def test_settings_of_the_sandbox_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; it must"):
        SandboxSettings(**{field: value})
