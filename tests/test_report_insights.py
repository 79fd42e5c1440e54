"""Backtracking and theorem scores, on trees small enough to be judged by eye."""

import dataclasses
import math
import statistics

import pytest
from tree_case import node

from smallmath_jax.records import Tree
from smallmath_jax.report import insights


def figure_4(**fields):
    """The paper's figure 4: SymPy first (falls to -0.517), then a simpler way (0.620), then the answer (0.835)."""
    nodes = [
        node("0", kind="root"),
        node("0.1", "# solve with SymPy", score=0.3),
        node("0.2", "# a simpler way, by Vieta's formulas", score=0.620, value=0.5),
        node("0.1.1", "# simplify", score=-0.517),
        node("0.1.2", "# expand", "error", score=None, value=-1.0),
        node(
            "0.2.1", "\\boxed{7}", "answer", score=0.835, answer="7", verdict="correct", value=1.0
        ),
    ]
    tree = Tree("p", "how many?", "7", nodes, chosen="0.2.1")
    return dataclasses.replace(tree, **fields)


def changed(tree, tag, **fields):
    nodes = [dataclasses.replace(n, **fields) if n.tag == tag else n for n in tree.nodes]
    return dataclasses.replace(tree, nodes=nodes)


def told(field, trees):
    for tree in trees:
        field.add(tree)
    return field.result()


def test_figure_4_is_found():
    page = lambda tree: f"../trees/{tree.problem_id}.html"
    found = told(insights.Backtracking(page=page), [figure_4()])
    assert (found["trees"], found["count"], found["right"]) == (1, 1, 1)
    assert (found["nodes"], found["left_out"]) == (
        4,
        0,
    )  # scored: not the root, not the failed step
    assert found["median_fall"] == pytest.approx(0.817) and found["above"] == 1
    (example,) = found["examples"]
    assert [step["score"] for step in example["left"]] == [0.3, -0.517]
    assert [step["score"] for step in example["taken"]] == [0.620, 0.835]
    assert [step["q"] for step in example["taken"]] == [0.5, 1.0]
    assert (example["prefix"], example["answer"]) == ([], "7")
    assert example["page"] == "../trees/p.html#0.1"


def test_a_branch_taken_that_scores_as_low_is_told_apart():
    sunk = changed(figure_4(), "0.2.1", score=-0.6)  # the model scored the right answer lower still
    assert told(insights.Backtracking(), [sunk])["above"] == 0
    unscored = changed(changed(figure_4(), "0.2.1", score=None), "0.2", score=None)
    found = told(insights.Backtracking(), [unscored])
    assert (found["count"], found["above"]) == (1, 0)


@pytest.mark.parametrize(
    "why,tree",
    [
        ("the score did not fall", changed(figure_4(), "0.1.1", score=0.31)),
        ("nothing was chosen", figure_4(chosen="")),
        ("what it settled on is wrong", changed(figure_4(), "0.2.1", verdict="wrong")),
        (
            "the chosen branch was expanded first",
            figure_4(nodes=[figure_4().nodes[i] for i in (0, 1, 2, 5, 3, 4)]),
        ),
    ],
)
def test_what_is_no_backtracking(why, tree):
    found = told(insights.Backtracking(), [tree])
    assert (found["trees"], found["count"], found["examples"]) == (1, 0, []), why


def test_examples_are_the_right_ones_with_the_deepest_falls():
    ungraded = changed(
        changed(figure_4(problem_id="ungraded"), "0.2.1", verdict=""), "0.1", score=1.0
    )
    deep = changed(figure_4(problem_id="deep", round=2), "0.1", score=0.9)
    found = told(insights.Backtracking(examples=2), [ungraded, figure_4(round=1), deep])
    assert [example["problem_id"] for example in found["examples"]] == ["deep", "p"]
    assert found["count"] == 3 and found["right"] == 2
    assert found["by_round"] == {str(n): {"trees": 1, "nodes": 4, "count": 1} for n in range(3)}


def without_scores(tree):
    return dataclasses.replace(tree, nodes=[dataclasses.replace(n, score=None) for n in tree.nodes])


def test_trees_searched_without_a_preference_model_are_left_out():
    """Their Q-values fall and rise too: rounds 1 and 2 must not count as turning back by a score."""
    blind = without_scores(figure_4(round=1))
    held_out = figure_4(round=3, extra={"settings": {"use_gold": False}})
    found = told(insights.Backtracking(), [blind, figure_4(round=3), held_out])
    assert (found["trees"], found["left_out"], found["count"]) == (2, 1, 2)
    assert list(found["by_round"]) == ["3", "3, held out"]
    assert told(insights.Backtracking(), [blind])["trees"] == 0
    found = told(insights.Theorems(), [blind, figure_4()])
    assert found["theorem"]["trees"] == found["other"]["trees"] == 1


def test_an_unscored_step_shows_no_score():
    graded = changed(
        figure_4(), "0.2.1", score=None
    )  # in annotation answers are graded, not scored
    (example,) = told(insights.Backtracking(), [graded])["examples"]
    assert [step["score"] for step in example["taken"]] == [0.620, None]
    assert [step["q"] for step in example["taken"]] == [0.5, 1.0]


def test_theorem_steps_against_others():
    second = changed(figure_4(), "0.2", score=0.2, text="# Vieta, then AM-GM")
    page = lambda tree: f"trees/{tree.problem_id}.html"
    found = told(insights.Theorems(page=page), [figure_4(), second])
    assert found["theorem"]["n"] == 2 and found["theorem"]["trees"] == 2
    assert found["theorem"]["mean_score"] == pytest.approx(0.41)
    assert found["other"]["n"] == 4  # not the root, the answers, the steps without a score
    assert set(found["by_theorem"]) == {"Vieta's formulas", "AM-GM inequality"}
    assert found["by_theorem"]["AM-GM inequality"] == {
        "n": 1,
        "trees": 1,
        "mean_score": 0.2,
        "mean_q": 0.5,
    }
    assert found["within"]["n"] == 2
    # one step a tree: the interval is the plain one of a mean
    error = statistics.stdev([0.62, 0.2]) / math.sqrt(2)
    assert found["theorem"]["ci"] == pytest.approx([0.41 - 1.96 * error, 0.41 + 1.96 * error])
    assert [one["theorem"] for one in found["examples"]] == ["Vieta's formulas", "AM-GM inequality"]
    assert {one["page"] for one in found["examples"]} == {"trees/p.html#0.2"}
    assert told(insights.Theorems(), [])["theorem"]["n"] == 0
