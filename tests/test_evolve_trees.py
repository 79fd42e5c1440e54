"""What a self-evolution run shows of its trees: every link of an example leads to a page that is there."""

import dataclasses
import json
import re
import types

import pytest
from tree_case import node

from smallmath_jax.records import Tree, write_part, write_text
from smallmath_jax.report import pages
from smallmath_jax.tasks import evolve_trees

SETTINGS = {"settings": {"use_gold": True}}
BLIND = {"settings": {"use_gold": False}}

LOW = node("0.1.2", "# expand", score=-0.9)


def turning(name, **fields):
    """A search that left 0.1, whose score fell, for 0.2, which names a theorem and answers."""
    nodes = [
        node("0", kind="root"),
        node("0.1", "# solve it", score=0.3),
        node("0.2", "# Vieta", score=0.5),
        node("0.1.1", "# simplify", score=-0.5),
        node("0.2.1", "\\boxed{7}", "answer", answer="7", verdict="correct", value=1.0),
    ]
    values = {"problem_id": name, "problem": "how many?", "gold": "7", "nodes": nodes}
    return Tree(**(values | {"chosen": "0.2.1", "extra": SETTINGS} | fields))


def bare(tree, **fields):
    nodes = [dataclasses.replace(one, **fields) for one in tree.nodes]
    return dataclasses.replace(tree, nodes=nodes)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(evolve_trees, "SHOWN_TREES", 2)
    for number in (1, 2, 3):
        names = [f"train/{number}-{place}" for place in range(3)]
        trees = [turning(name, round=number) for name in names]
        if number == 1:
            trees = [bare(tree, score=None) for tree in trees]
        write_part(tmp_path / f"round_{number}" / "search" / "trees", "00000-host0.jsonl", trees)
        held = [turning(f"test/{place}", round=number, extra=BLIND) for place in range(3)]
        held = [bare(tree, verdict="") for tree in held]
        held[2] = dataclasses.replace(held[2], nodes=[*held[2].nodes, LOW])  # the deepest fall
        folder = tmp_path / f"round_{number}" / "evaluate"
        write_part(folder / "trees", "00000-host0.jsonl", held)
        verdicts = [
            {"problem_id": f"test/{place}", "answer": "7", "verdict": verdict}
            for place, verdict in enumerate(("correct", "wrong", "correct"))
        ]
        write_part(folder / "verdicts", "00000.jsonl", verdicts)
    round_folder = lambda number: tmp_path / f"round_{number}"
    return types.SimpleNamespace(root=tmp_path, round_folder=round_folder)


def test_examples_link_to_pages_that_are_there(bench):
    record = evolve_trees.tell_trees(bench, 3)
    turned = record["backtracking"]
    # rounds 2 and 3 of training, and of each round's three held-out trees the two that are right
    assert (turned["trees"], turned["left_out"], turned["count"]) == (6 + 9, 3, 6 + 6)
    assert turned["by_round"]["1, held out"] == {"trees": 3, "nodes": 10, "count": 2}
    assert record["theorems"]["theorem"]["n"] == record["theorems"]["theorem"]["trees"] == 15
    write_text(bench.root / "evolution.json", json.dumps(record))
    pages.write_report(bench.root)
    page = (bench.root / "report" / "index.html").read_text()
    links = re.findall(r"href='([^'#]+\.html)(#[\d.]+)?'", page)
    assert ("trees/index.html", "") in links and ("trees_held_out/index.html", "") in links
    linked = {address: place for address, place in links if place}
    assert len(linked) >= 6 and any(address.startswith("trees_held_out") for address in linked)
    for address, place in links:
        text = (bench.root / "report" / address).read_text()
        assert not place or f'"{place[1:]}"' in text, "the page holds the node the link names"
    shown = {path.name for path in (bench.root / "report" / "trees").glob("*.html")}
    assert sum("train-3" in name for name in shown) >= 2, (
        "of the last round some without an example"
    )


def test_an_evaluation_without_searches_has_no_pages(bench):
    for number in (1, 2, 3):
        for path in (bench.root / f"round_{number}" / "evaluate").rglob("*.jsonl"):
            path.unlink()
    record = evolve_trees.tell_trees(bench, 3)
    assert record["backtracking"]["trees"] == 6
    assert not (bench.root / "report" / "trees_held_out").exists()
