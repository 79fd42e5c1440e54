"""The numbers of an evaluation against brute force and published values; the page holds what report.json holds."""

import itertools
import json
import math
import re
from xml.etree import ElementTree

import pytest

from smallmath_jax.records import write_part, write_text
from smallmath_jax.report import metrics, pages, plots


def row(
    problem, sample, verdict, answer="1", level=1, subject="algebra", decoding="sampled", name="set"
):
    return {
        "problem_id": problem,
        "sample": sample,
        "prompt": f"question {problem}",
        "text": f"<think>t</think><answer>{answer}</answer>",
        "token_ids": [1, 2, 3],
        "logprobs": [0.0, 0.0, 0.0],
        "stop_reason": "eos",
        "answer": answer,
        "gold": "1",
        "verdict": verdict,
        "level": level,
        "subject": subject,
        "images": [],
        "extra": {"decoding": decoding, "set": name},
    }


def test_wilson_has_its_published_values():
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29 at 95 %.
    for correct, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert metrics.wilson(correct, count) == pytest.approx((low, high), abs=5e-5)
    assert metrics.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("count,correct,k", [(6, 2, 1), (6, 2, 3), (8, 0, 2), (5, 4, 2), (7, 7, 7)])
def test_pass_at_k_is_the_mean_over_subsets(count, correct, k):
    flags = [True] * correct + [False] * (count - correct)
    subsets = list(itertools.combinations(flags, k))
    assert metrics.pass_at_k(count, correct, k) == pytest.approx(
        sum(map(any, subsets)) / len(subsets)
    )


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="at least 9"):
        metrics.pass_at_k(8, 1, 9)


def test_majority_takes_the_largest_class_and_the_earlier_on_a_tie():
    rows = [row("p", n, "wrong", answer) for n, answer in enumerate(["3", "2", "2", "3", None])]
    assert metrics.majority(rows)["answer"] == "3"
    assert metrics.majority(rows[1:])["answer"] == "2"
    assert metrics.majority(rows[4:]) is None
    same = lambda a, b: float(a) == float(b)
    assert (
        metrics.majority([row("p", n, "", a) for n, a in enumerate(["1", "2.0", "2"])], same)[
            "answer"
        ]
        == "2.0"
    )


def test_ungradable_samples_leave_numerator_and_denominator():
    rows = [
        row("a", 0, "correct"),
        row("b", 0, "timeout"),
        row("c", 0, "wrong"),
        row("d", 0, "unparsable_gold"),
    ]
    found = metrics.accuracy(rows)
    assert (found["accuracy"], found["n"], found["ungradable"]) == (0.5, 2, 2)


def test_a_vote_that_cannot_be_graded_leaves_its_problem_out():
    """Its samples vote all the same: without them another answer would win."""
    given = [
        ("timeout", "X"),
        ("timeout", "X"),
        ("correct", "7"),
        ("correct", "7"),
        ("correct", "7"),
    ]
    rows = [row("a", n, *one) for n, one in enumerate(given)]
    rows += [row("b", n, "wrong" if n % 2 else "correct", "7") for n in range(5)]
    found = metrics._sample_metrics(rows, (1, 3, 5), str.__eq__)
    assert [found["maj_at_k"][k]["accuracy"] for k in ("1", "3", "5")] == [1.0, 1.0, 1.0]
    assert found["maj_at_k"]["1"]["ci"] == list(metrics.wilson(1, 1))
    assert found["maj_at_k"]["5"]["ci"] == list(metrics.wilson(2, 2))
    assert found["pass_at_k"]["3"] == pytest.approx((1.0 + 1.0) / 2)
    assert found["pass_at_k"]["5"] == 1.0  # of b alone


def test_samples_of_one_problem_are_not_counted_as_independent():
    rows = [
        row(p, n, "correct" if (p, n) in (("a", 0), ("a", 1)) else "wrong")
        for p in "ab"
        for n in range(4)
    ]
    found = metrics.accuracy(rows)
    assert (found["accuracy"], found["n"]) == (0.25, 2)


def test_names_in_plots_are_words(tmp_path):
    name = "</svg><script>1</script> $x & Probability"
    cell = {"accuracy": 0.5, "n": 4, "ci": [0.2, 0.8], "correct": 2.0}
    drawn = [
        plots.accuracy_bars({name: {name: cell}, "b": {name: cell}}, name, form="svg"),
        plots.correct_pie({name: cell}, name, form="svg"),
        plots.curves([1], {name: [0.5], "b": [math.nan]}, name, form="svg"),
    ]
    for svg in drawn:
        root = ElementTree.fromstring(svg)  # well-formed, so the name stayed text
        assert root.get("aria-label") == name and root.get("role") == "img"
        kinds = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not kinds & {"script", "style", "metadata", "image"}
        assert name in [element.text for element in root.iter() if element.text]
        assert b'href="' not in svg and b"var(--ink)" in svg


def test_names_in_plots_cannot_break_or_reorder_them():
    """A surrogate half is no character for a font, and U+202E turns the text behind it around."""
    name = "\ud800 x\u202ey"
    cell = {"accuracy": 0.5, "n": 4, "ci": [0.2, 0.8], "correct": 2.0, "mean_score": 0.5}
    drawn = [
        plots.accuracy_bars({name: {name: cell}, "b": {name: cell}}, name, form="svg"),
        plots.correct_pie({name: cell}, name, form="svg"),
        plots.curves([1, 2], {name: [1, 2], "b": [1, 2]}, name, form="svg"),
        plots.shares(
            {name: [(1, 0.5, 0.2, 0.8)], "b": [(1, 0.5, 0.2, 0.8)]}, name, "x", form="svg"
        ),
        plots.score_rows({name: cell}, name, form="svg"),
        plots.length_histogram({name: [1, 2], "b": [3]}, form="svg"),
    ]
    for svg in drawn:
        assert "\u202e" not in svg.decode() and "⟦U+202E⟧" in svg.decode()


def test_summary_and_page(tmp_path):
    rows = [row(f"p{n}", 0, "correct" if n % 3 else "wrong", level=n % 5 + 1) for n in range(30)]
    rows += [row(f"u{n}", 0, "wrong", name="tiny:unseen") for n in range(10)]
    rows += [{**r, "extra": {"decoding": "greedy", "set": r["extra"]["set"]}} for r in rows]
    result = metrics.summarise(rows, headline="sampled", k=(1,))
    assert result["n"] == 30 and result["accuracy"] == pytest.approx(20 / 30)
    assert result["by_set"]["tiny:unseen"]["accuracy"] == 0
    assert result["sampled"]["pass_at_k"]["1"] == pytest.approx(20 / 30)
    assert set(result["by_level"]) == {"1", "2", "3", "4", "5"}
    for name in ("before", "after"):
        write_part(tmp_path / "eval" / name / "completions", "00000000-00000-host0.jsonl", rows)
        write_text(tmp_path / "eval" / name / "result.json", json.dumps(result))
    log = [{"step": n, "reward": n / 50, "accuracy": 0.1, "loss": math.nan} for n in range(1, 51)]
    write_part(tmp_path / "metrics", "00000050-host0.jsonl", log)
    told = {
        "kept": 7,
        "dropped": {"shared with <b>": 2},
        "origin": {"amc": 7},
        "licence": {"MIT": 7},
    }
    data = {"convert:set": {"problems": 9} | told}
    write_text(tmp_path / "config.json", json.dumps({"training_data": data}))
    record = pages.write_report(tmp_path, wall_s=12.3)
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    for name in ("accuracy", "n", "ci", "by_level", "by_subject"):
        assert stored["before"][name] == stored["after"][name] == stored[name] == result[name]
    assert stored["wall_s"] == 12.3 and record["training"]["train"]["steps"] == 50
    page = (tmp_path / "report" / "index.html").read_text()
    assert "66.7%" in page and "question p1" in page
    assert stored["training_data"] == data
    assert all(words in page for words in ("shared with &lt;b&gt; (2)", "amc (7)", "MIT (7)"))
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must hold all it shows"
