"""From trees to data: votes, pairs, SFT selection, filters, reward-model examples, and what trees show of reasoning."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest

from smallmath_jax.records import Node, Tree
from smallmath_jax.search import select
from smallmath_jax.search.analysis import backtracks, theorem_gap, theorems_in
from smallmath_jax.search.pairs import (
    PairSettings,
    edit_distance,
    outcomes,
    preference_pairs,
    step_pairs,
    trajectory_pairs,
)
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.tree import LiveNode, LiveTree, path_to
from smallmath_jax.search.vote import (
    RULES,
    SCALES,
    Ballot,
    choose,
    chosen_ballot,
    lead_probability,
    leaf_ballots,
    published_vote,
    vote,
)

SAME = str.__eq__


def node(tag, q=0.0, visits=1, kind="open", **fields):
    text = fields.pop("text", f"step {tag} " + "x" * 30 * int(tag[-1]))
    return Node(
        tag=tag,
        text=text,
        token_ids=fields.pop("token_ids", [int(part) for part in tag.split(".")]),
        written=fields.pop("written", len(tag.split("."))),
        log_prob=fields.pop("log_prob", -1.0),
        kind="root" if tag == "0" else kind,
        visit_count=visits,
        value_sum=q * visits,
        **fields,
    )


def leaf(tag, right, **fields):
    verdict, value = ("correct", 1.0) if right else ("wrong", -1.0)
    fields = {"answer": "3" if right else "4"} | fields
    return node(tag, value, kind="answer", verdict=verdict, **fields)


def tree(*nodes, **fields):
    root = node("0", token_ids=[], written=0, text="")
    return Tree(problem_id="p", problem="Q?", gold="3", nodes=[root, *nodes], **fields)


# Two siblings with both outcomes below; 0.3 failed, 0.4 was never looked at
SMALL = tree(
    node("0.1", 0.5, 4),
    node("0.2", -0.5, 4),
    node("0.3", -1.0, kind="error", errors=1),
    node("0.4", 0.0, 0),
    leaf("0.1.1", True),
    leaf("0.2.1", False),
    node("0.1.2", -0.2, 2),
    leaf("0.1.2.1", False),
    chosen="0.1.1",
)


def test_votes_by_hand():
    ballots = [
        Ballot("3", score=0.2, log_prob=-5.0, tag="a"),
        Ballot("5", score=0.9, log_prob=-30.0, tag="b"),
        Ballot("3.0", score=-0.4, log_prob=-1.0, tag="c"),
        Ballot("7", score=0.1, log_prob=-2.0, tag="d"),
    ]
    equal = lambda first, second: float(first) == float(second)
    results = {rule: vote(ballots, equal, rule) for rule in RULES}
    assert [(one.answer, one.count) for one in results["majority"]] == [
        ("3", 2),
        ("5", 1),
        ("7", 1),
    ]
    assert results["best"][0].answer == "5" and results["likeliest"][0].answer == "3"
    odds = {one.tag: math.exp(5 * math.atanh(one.score)) for one in ballots}
    top = odds["b"]
    weights = [odds["b"] / top, (odds["a"] + odds["c"]) / top, odds["d"] / top]
    assert [one.weight for one in results["weighted"]] == pytest.approx(weights)
    joint = {one.tag: odds[one.tag] * math.exp(one.log_prob) for one in ballots}
    assert max(joint, key=joint.get) == "d" == results["best_posterior"][0].ballots[0].tag
    weights = [1.0, (joint["a"] + joint["c"]) / joint["d"], joint["b"] / joint["d"]]
    assert [one.weight for one in results["posterior"]] == pytest.approx(weights)
    even = vote(ballots, equal, "weighted", SCALES["pqm"])
    assert [one.answer for one in even] == ["5", "3", "7"]
    assert [one.weight for one in even] == pytest.approx([1.0, 0.9 / 0.95, 0.55 / 0.95])
    # The published protocol: of the three best by score, two disagree, so the score decides
    assert published_vote(ballots, equal, top_k=3)[0].answer == "5"
    assert published_vote(ballots, equal, top_k=4)[0].answer == "3"
    assert vote([], equal) == []
    with pytest.raises(ValueError, match="majority, weighted"):
        vote(ballots, equal, "median")


@pytest.mark.parametrize("scale", SCALES.values())
def test_a_further_vote_never_hurts_its_answer(scale):
    """Sums of bare scores, as the public code has them, would: here 3 has the lower sum."""
    ballots = [Ballot("3", -0.5), Ballot("4", -0.4), Ballot("3", -0.5)]
    for rule in ("majority", "weighted", "posterior"):
        assert vote(ballots, SAME, rule, scale)[0].answer == "3"


def test_votes_do_not_depend_on_the_order_of_ballots_but_in_ties():
    rng = random.Random(0)
    for _ in range(30):
        ballots = [Ballot(rng.choice("abc"), rng.uniform(-1, 1)) for _ in range(7)]
        for rule in RULES:
            winners = {
                vote(list(some), SAME, rule)[0].answer
                for some in itertools.islice(itertools.permutations(ballots), 0, 5040, 711)
            }
            assert len(winners) == 1


def test_lead_probability_is_the_beta_tail():
    rng = np.random.default_rng(0)
    for first, second in ((1, 0), (4, 0), (5, 2), (9, 8), (2, 6)):
        drawn = rng.beta(first + 1, second + 1, 200_000)
        assert lead_probability(first, second) == pytest.approx((drawn > 0.5).mean(), abs=5e-3)
    assert lead_probability(3, 3) == pytest.approx(0.5)


def test_ballots_of_a_tree():
    ballots = leaf_ballots(SMALL)
    assert [(one.answer, one.tag) for one in ballots] == [
        ("3", "0.1.1"),
        ("4", "0.2.1"),
        ("4", "0.1.2.1"),
    ]
    assert (ballots[2].log_prob, ballots[2].tokens) == (-3.0, 2 + 3 + 4)
    assert chosen_ballot(SMALL) == ballots[0]
    assert chosen_ballot(tree()) is None
    assert [one.tag for one in path_to(SMALL, "0.1.2.1")] == ["0.1", "0.1.2", "0.1.2.1"]


def test_choosing_by_value_or_by_votes():
    root = LiveNode()
    answers = [
        LiveNode(
            tag=f"0.{index}", parent=root, kind="answer", answer=text, visit_count=1, value_sum=q
        )
        for index, (text, q) in enumerate([("4", 0.1), ("4", 0.3), ("5", 0.8)], 1)
    ]
    live = LiveTree([root, *answers])
    assert choose(live, SearchSettings(use_gold=False), SAME) == "0.3"
    assert choose(live, SearchSettings(use_gold=False, choose="votes"), SAME) == "0.2"
    assert choose(LiveTree(), SearchSettings(), SAME) == ""


def test_outcomes_against_a_count_by_prefix():
    rng = random.Random(0)
    for _ in range(20):
        grown = random_tree(rng)
        for one, counts in outcomes(grown).items():
            below = [
                n for n in grown.nodes if (n.tag + ".").startswith(one + ".") and n.kind == "answer"
            ]
            assert counts.right == sum(n.verdict == "correct" for n in below)
            assert counts.wrong == sum(n.verdict == "wrong" for n in below)


def random_tree(rng, size=40):
    nodes, opened, count = [], ["0"], {"0": 0}
    while len(nodes) < size:
        parent = rng.choice(opened)
        count[parent] += 1
        tag = f"{parent}.{count[parent]}"
        if rng.random() < 0.4 and parent != "0":
            nodes.append(leaf(tag, rng.random() < 0.5))
        else:
            nodes.append(node(tag, rng.uniform(-1, 1), rng.randrange(1, 9)))
            opened.append(tag)
            count[tag] = 0
    return tree(*nodes)


def test_pairs_against_a_search_over_all_siblings():
    rng = random.Random(1)
    total = 0
    for _ in range(30):
        grown, marks = random_tree(rng), None
        marks = outcomes(grown)
        for pair in step_pairs(grown):
            total += 1
            siblings = [n for n in grown.nodes if n.parent == pair.chosen.parent]
            assert pair.chosen in siblings and pair.rejected in siblings
            assert marks[pair.chosen.tag].right and marks[pair.rejected.tag].wrong
            above = [n for n in siblings if marks[n.tag].right and n.q_value > pair.chosen.q_value]
            below = [
                n for n in siblings if marks[n.tag].wrong and n.q_value < pair.rejected.q_value
            ]
            rights = sum(marks[n.tag].right > 0 for n in siblings)
            wrongs = sum(marks[n.tag].wrong > 0 for n in siblings)
            assert len(above) < (4 if wrongs == 1 else 2)
            assert len(below) < (4 if rights == 1 or min(rights, 4) == 1 else 2)
            assert pair.margin == pair.chosen.q_value - pair.rejected.q_value > 0
            assert pair.positives <= 4 and pair.negatives <= 4
    assert total > 30


def test_pairs_carry_ids_and_their_prefix():
    pairs, counts = preference_pairs(SMALL, PairSettings(min_edit=0), prompt_tokens=10)
    top, below, *whole = pairs
    assert (top.prefix_ids, top.chosen_ids, top.rejected_ids) == ([], [0, 1], [0, 2])
    assert (below.prefix_ids, below.chosen_ids, below.rejected_ids) == (
        [0, 1],
        [0, 1, 1],
        [0, 1, 2],
    )
    assert (top.margin, below.margin) == pytest.approx((1.0, 1.2))
    assert [pair.kind for pair in whole] == ["trajectory"] * 2
    assert counts == {"step": 2, "trajectory": 2}
    assert whole[0].chosen_ids == [0, 1, 0, 1, 1] and whole[0].prefix_ids == []
    assert (whole[0].positives, whole[0].negatives) == (1, 2)


def test_trajectory_pairs_take_the_extremes_of_mean_q():
    grown = random_tree(random.Random(5), 80)
    pairs = trajectory_pairs(grown)
    means = lambda verdict: sorted(
        sum(n.q_value for n in path_to(grown, one.tag)) / len(path_to(grown, one.tag))
        for one in grown.nodes
        if one.verdict == verdict
    )
    best, worst = means("correct")[::-1][:2], means("wrong")[:2]
    expected = [good - bad for good in best for bad in worst]
    assert [pair.margin for pair in pairs] == pytest.approx(expected)


def test_pairs_left_out_are_counted():
    made = lambda **fields: preference_pairs(SMALL, PairSettings(**fields))[1]
    assert made(min_margin=1.1, min_edit=0) == {"margin": 1, "step": 1, "trajectory": 2}
    assert made(min_edit=1000) == {"edit": 2, "trajectory": 2}
    assert made(min_edit=0, trajectories=False, max_tokens=4) == {"step": 1, "too_long": 1}
    same = [dataclasses.replace(one, text="same", token_ids=[7]) for one in SMALL.nodes]
    counts = preference_pairs(dataclasses.replace(SMALL, nodes=same), PairSettings(min_edit=0))[1]
    assert counts["identical"] >= 2 and "step" not in counts
    assert preference_pairs(tree(leaf("0.1", True))) == ([], {})
    with pytest.raises(ValueError, match="all, vis_count"):
        PairSettings(descend="none")


def plain_distance(a, b):
    """Levenshtein by its recursive definition."""
    table = {(i, j): i or j for i in range(len(a) + 1) for j in range(len(b) + 1) if not i or not j}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            change = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, change)
    return table[len(a), len(b)]


def test_edit_distance_with_and_without_a_limit():
    rng = random.Random(0)
    for _ in range(150):
        a, b = ("".join(rng.choices("abé", k=rng.randrange(14))) for _ in range(2))
        distance = plain_distance(a, b)
        assert edit_distance(a, b) == distance
        for limit in (1, 3, 6):
            limited = edit_distance(a, b, limit)
            assert limited == distance if distance <= limit else limited > limit


def test_trajectories_and_their_selection():
    found = select.trajectories(SMALL)
    assert [one.steps[-1].tag for one in found] == ["0.1.1", "0.1.2.1", "0.2.1", "0.3", "0.4"]
    assert [one.outcome for one in found] == ["correct", "wrong", "wrong", "error", "other"]
    assert [one.outcome for one in select.finished(SMALL)] == ["wrong", "wrong", "error", "correct"]
    first = found[0]
    assert (first.mean_q, first.lowest_q, first.answer) == (0.75, 0.5, "3")
    assert first.token_ids == [0, 1, 0, 1, 1] and all(first.written)
    assert [one.steps[-1].tag for one in select.select_sft(SMALL)] == ["0.1.1"]
    assert select.finished(tree(node("0.1"))) == [] and select.trajectories(tree()) == []


def test_what_a_program_printed_is_told_apart_from_what_the_policy_wrote():
    one = node("0.1", token_ids=[1, 2, 3, 4], written=2)
    [found] = select.trajectories(tree(one))
    assert found.written == [True, True, False, False]


def test_sft_variants():
    nodes = [
        node("0.1", 0.9),
        node("0.2", 0.1),
        node("0.3", 0.5),
        node("0.4", 0.3),
        node("0.5", 0.95, errors=1),
    ]
    leaves = [leaf(f"{one.tag}.1", one.tag != "0.3", text="answer") for one in nodes]
    grown = tree(*nodes, *leaves)
    tags = lambda variant, **fields: [
        one.steps[0].tag for one in select.select_sft(grown, variant, **fields)
    ]
    assert tags("step_verified") == ["0.1", "0.4"]  # 0.5 passed through a failed step
    assert set(tags("rejection", n=9)) == {"0.1", "0.2", "0.4", "0.5"}
    assert set(tags("random", n=9)) == {"0.1", "0.2", "0.3", "0.4", "0.5"}
    assert tags("random", seed=1) == tags("random", seed=1)
    assert len({tuple(tags("random", seed=seed)) for seed in range(9)}) > 3
    twice = tree(*nodes, *leaves, leaf("0.1.2", True, text="answer"))
    assert len({one.text for one in select.select_sft(twice, n=9)}) == len(
        select.select_sft(twice, n=9)
    )
    with pytest.raises(ValueError, match="step_verified, rejection, random"):
        select.select_sft(grown, "best")


def test_examples_of_the_other_reward_models():
    orm = select.orm_examples(SMALL)
    assert [(one.token_ids, one.value) for one in orm] == [
        ([0, 1, 0, 1, 1], 1.0),
        ([0, 1, 0, 1, 2, 0, 1, 2, 1], 0.0),
        ([0, 2, 0, 2, 1], 0.0),
    ]
    pqm = {tuple(one.token_ids): one.value for one in select.pqm_examples(SMALL)}
    assert len(pqm) == 7 and pqm[0, 1, 0, 1, 2] == pytest.approx(-0.2)  # all but the root and 0.4


def test_difficulty_and_label_noise():
    easy, hard = tree(leaf("0.1", True)), tree(leaf("0.1", False))
    assert [select.difficulty([one]) for one in (easy, hard, SMALL, tree())] == [
        "easy",
        "hard",
        "medium",
        "hard",
    ]
    assert select.difficulty([easy, hard]) == "medium"
    assert (
        select.right_share([SMALL]) == pytest.approx(1 / 3) and select.right_share([tree()]) is None
    )
    assert select.label_noise([SMALL]) and select.label_noise([tree()])
    assert not select.label_noise([easy, hard]) and select.label_noise([easy, hard], threshold=0.6)
    total = select.summary([[easy, hard, SMALL], [dataclasses.replace(easy, problem_id="q")]])
    assert (total["problems"], total["medium"], total["easy"], total["coverage"]) == (2, 1, 1, 1.0)
    assert select.summary([])["coverage"] == 0.0


def test_labels_of_synthetic_problems():
    equal = lambda first, second: float(first) == float(second)
    assert select.agreed_answer(["3", "3.0", None, "4", "3"], equal) == "3"
    assert select.agreed_answer(["3", "3.0", "4"], equal) is None
    assert select.agreed_answer(["3", "3", "3", "4", "4", "4"], equal) is None
    assert select.agreed_answer(["3", "3"], equal, agreeing=2) == "3"
    assert select.agreed_answer([None, None], equal) is None


def test_turning_back_as_in_figure_4():
    # First SymPy on a hard equation, whose value falls to -0.5; then "a simpler way", which wins
    grown = tree(
        node("0.1", score=0.1, text="# solve the equation with SymPy"),
        node("0.2", score=0.05, text="# a simpler way: search the integers"),
        node("0.1.1", score=-0.517, text="# expand the fractions"),
        node("0.1.1.1", -1.0, kind="error"),
        node("0.2.1", score=0.62),
        leaf("0.2.1.1", True, score=0.835),
        chosen="0.2.1.1",
    )
    [found] = backtracks(grown)
    assert (found.at, found.left, found.taken) == (
        "0",
        ("0.1", "0.1.1"),  # not down to the failed step: it has no score
        ("0.2", "0.2.1", "0.2.1.1"),
    )
    assert found.left_scores == (0.1, -0.517) and found.taken_scores == (0.05, 0.62, 0.835)
    assert found.fall == pytest.approx(0.617)
    assert backtracks(grown, min_fall=0.62) == []
    # The other way round nothing was left: the winning branch came first
    assert backtracks(dataclasses.replace(grown, chosen="0.1.1")) == []
    wrong = [
        dataclasses.replace(one, verdict="wrong") if one.answer else one for one in grown.nodes
    ]
    assert backtracks(dataclasses.replace(grown, nodes=wrong)) == []
    assert backtracks(dataclasses.replace(grown, chosen="")) == []


def test_steps_that_name_a_theorem():
    named = {
        "# by Fermat’s Little Theorem": "Fermat's little theorem",
        "# Use Vieta’s formulas": "Vieta's formulas",
        "# AM-GM gives": "AM-GM inequality",
        "# By the Pythagorean theorem": "Pythagorean theorem",
        "# shoelace formula for the area": "Shoelace theorem",
        "# Chinese Remainder Theorem": "Chinese remainder theorem",
    }
    for text, name in named.items():
        assert theorems_in(text) == [name]
    assert theorems_in("x = program(1)  # am gmail") == []
    grown = tree(
        node("0.1", score=0.8, text="# by Vieta"),
        node("0.2", score=0.2, text="# try all"),
        node("0.3", -0.4, 2, text="# shoelace"),
        node("0.4", 0.0, 0, text="# Vieta, never visited"),
        leaf("0.1.1", True, text="Vieta"),
    )
    # 0.3 and 0.4 have no score: their Q-values say nothing about a preference model
    assert theorem_gap([grown, tree(node("0.1", 0.5))]) == {"n": 1, "mean": pytest.approx(0.6)}
    assert theorem_gap([]) == {"n": 0, "mean": None}


def test_without_scores_nothing_is_told():
    """A terminal-guided tree has values that fall and rise, and no preference model's score."""
    grown = tree(
        node("0.1", 0.4, text="# Vieta"),
        node("0.2", 0.5),
        node("0.1.1", -0.9),
        leaf("0.2.1", True),
        chosen="0.2.1",
    )
    assert backtracks(grown) == [] and theorem_gap([grown])["n"] == 0
    scored = [dataclasses.replace(one, score=one.q_value) for one in grown.nodes]
    assert len(backtracks(dataclasses.replace(grown, nodes=scored))) == 1
