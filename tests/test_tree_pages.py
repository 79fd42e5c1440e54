"""The page of a tree that a search made: a header of a few words, and priors as the search's bound uses them."""

import json
import math
import random
import re

import numpy as np
import pytest
from driver_case import next_step
from search_case import candidate, searched
from tree_case import node as made

from smallmath_jax.records import Tree
from smallmath_jax.report import trees
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.steps import ending
from smallmath_jax.search.tree import from_record, uct

SETTINGS = SearchSettings(rollouts=128, candidates=8, max_depth=9, exploration=2.0, prior=1.5)


async def generate(handle, n, keys):
    """Steps drawn by key whose numbers seldom repeat, so that 128 rollouts find something new each."""
    source, drawn = random.Random(f"{handle} {keys.tolist()}"), []
    for _ in range(n):
        text = next_step(handle, source).replace("x=", f"x={source.randrange(1, 999)}")
        mark = ending(text)
        drawn.append(candidate(text.removesuffix(mark), mark, -10 * source.random()))
    return drawn


@pytest.fixture(scope="module")
def tree():
    found = searched(generate, SETTINGS, gold="4")
    assert len(found.nodes) > 80 and len(json.dumps(found.extra)) > 2000
    return found


def data_of(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[
        1
    ]
    data = json.loads(text)
    return {row[0]: dict(zip(data["fields"], row, strict=True)) for row in data["rows"]}


def test_the_header_tells_what_a_reader_wants_of_a_search(tree):
    header = re.search(r"<header>.*?</header>", trees.tree_page(tree), re.DOTALL)[0]
    note = re.search(r"<p class=note>(.*?)</p>", header)[1]
    assert len(header) < 2000 and len(note) < 300, note
    for words in ("candidates a step 8", "exploration c 2.0", "weight of the prior 1.5"):
        assert words in note
    for words in ("walks", "exhausted", "[", "{"):
        assert words not in note


def test_priors_are_those_of_the_searchs_bound(tree):
    rows = data_of(trees.tree_page(tree))
    live = from_record(tree)
    assert rows["0"]["prior"] is None
    for node in live.nodes[1:]:
        bare, whole = (uct(node, 0.0, "zero", prior) for prior in (0.0, 1.0))
        above = math.sqrt(node.parent.visit_count) / (1 + node.visit_count)
        assert rows[node.tag]["prior"] * above == pytest.approx(whole - bare, abs=1e-12)
    # and by hand: a softmax over siblings of the mean log-prob a token
    children = [node for node in tree.nodes if node.parent == "0"]
    means = np.array([node.log_prob / node.written for node in children])
    shares = np.exp(means) / np.exp(means).sum()
    assert [rows[node.tag]["prior"] for node in children] == pytest.approx(shares.tolist())
    assert len(children) > 1 and np.ptp(shares) > 0.01


def test_trees_that_cannot_be_graded_are_in_no_share(tmp_path):
    def answered(name, verdict, gold="3"):
        nodes = [made("0", kind="root"), made("0.1", kind="answer", answer="3", verdict=verdict)]
        return Tree(name, "One?", gold, nodes, chosen="0.1")

    found = [answered(f"right {n}", "correct") for n in range(5)]
    found += [answered("wrong", "wrong"), Tree("none", "One?", "3", [made("0", kind="root")])]
    found += [
        answered("slow", "timeout"),
        answered("odd", "unparsable_gold"),
        answered("?", "", ""),
    ]
    trees.write_tree_index(iter(found), tmp_path, title="Some")
    assert "5 (71.4% of 7 that can be graded)" in (tmp_path / "index.html").read_text()
    trees.write_tree_index(iter(found[:7]), tmp_path, title="Some")
    assert "5 (71.4%)" in (tmp_path / "index.html").read_text()
