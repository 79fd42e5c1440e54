"""Trees on disk: published in time, found by their index, read one by one, the same however they came there."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time

import driver_case as case
import pytest
import stage_case
from test_driver import Stop, grow

from smallmath_jax.records import Node, Tree, read_parts, write_part
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.tasks import tree_parts
from smallmath_jax.tasks.search import grow_trees
from smallmath_jax.tasks.tree_parts import FAILED, Parts, find_trees, read_tree, read_trees


def tree(name, seed=0, text="", verdicts=(), **fields):
    nodes = [Node("0", text, [], 0, 0.0, "root", 0, 0.0)]
    for number, verdict in enumerate(verdicts, 1):
        nodes.append(Node(f"0.{number}", "é", [1], 1, 0.0, "answer", 1, 1.0, verdict=verdict))
    return Tree(name, "Q?", "1", nodes, seed=seed, **fields)


TREES = [
    tree("b", text="a\u2028line\u0085or two", verdicts=("correct", "wrong", "correct"), level=3),
    tree("a", 7, "čtyři \U0001f600", source="AI-MO/NuminaMath-1.5::train", stopped="rollouts"),
    tree("a", 0, verdicts=("wrong",), extra={"origin": "olympiads"}),
    tree("c", source=""),
]


@pytest.fixture
def no_prompts(monkeypatch):
    stage_case.without_prompts(monkeypatch.setattr)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tree_is_found_where_it_lies(tmp_path, monkeypatch, indexed):
    monkeypatch.setattr(tree_parts, "PART_TREES", 3)
    with Parts(tmp_path) as parts:
        parts.add(*TREES[:3])
        parts.add(TREES[3])
    if not indexed:  # a folder of an earlier version
        for path in (tmp_path / "index").iterdir():
            path.unlink()
    entries = find_trees([tmp_path])
    assert [(one.key, one.right, one.group) for one in entries] == [
        (("a", 0), 0, "olympiads"),
        (("a", 7), 0, "NuminaMath-1.5::train"),
        (("b", 0), 2, "3"),
        (("c", 0), 0, "unknown"),
    ]
    assert read_trees([tmp_path]) == sorted(TREES, key=lambda one: (one.problem_id, one.seed))
    assert read_tree(entries[2]) == TREES[0]
    assert len(list(read_parts(tmp_path))) == 4  # neither its marks of lines nor the index disturb


def test_the_index_is_published_before_its_part(tmp_path, monkeypatch):
    published = []
    monkeypatch.setattr(tree_parts, "write_text", lambda path, text: published.append(path))
    with Parts(tmp_path) as parts:
        parts.add(TREES[0])
    name = "00000-host0.jsonl"
    assert published == [tmp_path / "index" / name, tmp_path / name]


def test_a_part_that_its_index_does_not_describe_is_refused(tmp_path):
    for folder, rows in (("x", TREES[:1]), ("y", TREES[1:2])):
        with Parts(tmp_path / folder) as parts:
            parts.add(*rows)
    os.replace(tmp_path / "y" / "00000-host0.jsonl", tmp_path / "x" / "00000-host0.jsonl")
    with pytest.raises(ValueError, match="damaged|not the part that its index describes"):
        read_trees([tmp_path / "x"])
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "00000-host0.jsonl").write_text('{"problem_id": "a", "no')
    with pytest.raises(ValueError, match="00000-host0.jsonl, line 1: .*damaged"):
        find_trees([tmp_path / "z"])


def test_a_damaged_index_is_named(tmp_path):
    with Parts(tmp_path) as parts:
        parts.add(*TREES)
    index = tmp_path / "index" / "00000-host0.jsonl"
    index.write_bytes(index.read_bytes()[:-9])
    with pytest.raises(ValueError, match="index/00000-host0.jsonl: damaged .* delete it"):
        find_trees([tmp_path])
    index.unlink()
    assert len(find_trees([tmp_path])) == len(TREES)


def test_a_failed_search_stands_in_for_nothing(tmp_path):
    """Its part may have the later name: hosts number theirs apart, and a run goes on with other hosts."""
    well, badly = tree("p", stopped="rollouts", rollouts=2), tree("p", stopped=FAILED)
    write_part(tmp_path / "a", "00001-host0.jsonl", [well])
    write_part(tmp_path / "a", "00005-host1.jsonl", [badly])
    write_part(tmp_path / "b", "00000-host0.jsonl", [badly])
    assert read_trees([tmp_path / "a", tmp_path / "b"]) == [well]
    assert read_trees([tmp_path / "b", tmp_path / "a"]) == [well]
    later = dataclasses.replace(well, rollouts=9)
    write_part(tmp_path / "c", "00000-host0.jsonl", [later])
    assert read_trees([tmp_path / "a", tmp_path / "c"]) == [later]
    other = dataclasses.replace(well, round=2)  # a round's own tree, with the seed of all rounds
    write_part(tmp_path / "d", "00000-host0.jsonl", [other])
    assert read_trees([tmp_path / "d", tmp_path / "a"]) == [well, other]


def test_a_failed_search_is_tried_again_and_counted(tmp_path, no_prompts, capsys):
    async def fragile(prefix, code):
        if down and "=5" in prefix and "=5" in code:
            raise OSError("the pipe is gone")
        return await case.run_program(prefix, code)

    host = dataclasses.replace(case.HOST, run_program=fragile)
    down = True
    first = grow(tmp_path / "trees", Stop(10**9), host=host)
    failed = {key for key, row in first.items() if row["stopped"] == FAILED}
    assert failed and failed != set(first)
    assert f"{len(failed)} searches failed" in (told := capsys.readouterr().out)
    assert "the pipe is gone" in told
    down = False
    grow(tmp_path / "trees", Stop(10**9), host=host)
    assert len(list(read_parts(tmp_path / "trees"))) == len(first) + len(failed)
    whole = grow(tmp_path / "whole", Stop(10**9))
    found = {(one.problem_id, one.seed): one for one in read_trees([tmp_path / "trees"])}
    expected = {(one.problem_id, one.seed): one for one in read_trees([tmp_path / "whole"])}
    assert found == expected and len(whole) == len(first)
    assert "searches failed" not in capsys.readouterr().out


def test_what_waits_is_published_after_a_while(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tree_parts.time, "monotonic", lambda: now[0])
    with Parts(tmp_path) as parts:
        parts.add(TREES[0])
        now[0] += tree_parts.PART_SECONDS - 1
        parts.tick()
        assert not list(read_parts(tmp_path))
        now[0] += 1
        parts.tick()
        assert len(list(read_parts(tmp_path))) == 1
        parts.add(TREES[1])
        now[0] += tree_parts.PART_SECONDS
        parts.add(TREES[2])
        assert len(list(read_parts(tmp_path))) == 3


KILLED = """
import sys
import driver_case, stage_case, test_tree_parts

test_tree_parts.tree_parts.PART_SECONDS = 0.2
stage_case.without_prompts()

class Engine(driver_case.ScriptedEngine):
    def step(self):  # the last searches never end
        return super().step() if self.decoded < 120 else []

test_tree_parts.search_twenty(sys.argv[1], Engine(slots=2))
"""


def search_twenty(folder, engine):
    bench = stage_case.make_bench(folder, engine=engine)
    problems = [case.problem(f"p{n}") for n in range(20)]
    settings = SearchSettings(rollouts=3, candidates=3, max_depth=6)
    driver = bench.driver(None, None, 0)
    grow_trees(driver, problems, settings, bench.root / "trees", bench.config, stop=bench.stop)


def test_sigkill_costs_no_more_than_the_last_seconds(tmp_path, no_prompts):
    """Fewer trees than a part holds: without a clock nothing would be on disk before the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment | {"JAX_PLATFORMS": "cpu"}
    )
    deadline = time.monotonic() + 120
    try:
        while not list(read_parts(tmp_path / "trees")) and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    saved = list(read_parts(tmp_path / "trees"))
    assert 0 < len(saved) < 20
    search_twenty(tmp_path, case.ScriptedEngine())
    rows = list(read_parts(tmp_path / "trees"))
    assert rows[: len(saved)] == saved  # none lost, none done twice
    assert sorted(row["problem_id"] for row in rows) == sorted(f"p{n}" for n in range(20))


def test_a_search_is_watched_and_its_draws_are_progress(tmp_path, no_prompts, monkeypatch):
    events = []

    @contextlib.contextmanager
    def watchdog(limit_s):
        events.append(limit_s)
        yield
        events.append("off")

    monkeypatch.setattr(tree_parts.hosts, "watchdog", watchdog)
    monkeypatch.setattr(tree_parts.hosts, "beat", events.append)
    grow(tmp_path, Stop(10**9), watchdog_s=60)
    assert (events[0], events[-1]) == (60, "off")
    assert {"sampling", "a search"} == set(events[1:-1])
    events.clear()
    silent = case.ScriptedEngine()
    silent.step = lambda: []  # a server that never answers
    with pytest.raises(SystemExit):
        grow(tmp_path / "silent", Stop(5), silent, watchdog_s=60)
    assert events == [60, "off"]
