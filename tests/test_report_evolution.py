"""The report of a self-evolution run: each section with its data only; numbers, escaping, broken input."""

import copy
import json
import re

import pytest
from evolution_case import evolution
from tree_case import HOSTILE, large_tree

from smallmath_jax.records import write_part, write_text
from smallmath_jax.report import evolution as room
from smallmath_jax.report import pages, trees

TITLES = {
    "rounds": "Rounds of self-evolution",
    "scaling": "Test-time scaling",
    "stopping": "What early stops save",
    "backtracking": "Backtracking",
    "theorems": "Steps that apply a theorem",
    "reward_models": "Policy and reward model",
}


class NoPictures:
    """Takes the place of pages.Pictures where only the words are looked at."""

    def __call__(self, name, draw, *data, caption="", **options):
        return f"<figure>{name}</figure>"


def test_the_page_and_report_json_hold_what_the_run_wrote(tmp_path):
    found = evolution()
    write_text(tmp_path / "evolution.json", json.dumps(found))
    record = pages.write_report(tmp_path, wall_s=7200)
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {name: stored[name] for name in TITLES} == found
    assert (
        stored["accuracy"] == pytest.approx(0.784) and stored["n"] == 500 and len(stored["ci"]) == 2
    )
    assert stored["wall_s"] == 7200 and record["by_level"] == {}
    page = (tmp_path / "report" / "index.html").read_text()
    for title in TITLES.values():
        assert f">{title}</h2>" in page
    shown = [
        "89.4%",
        "78.4%",
        "90.2%",
        "80.6%",
        "50.0%",
        "12.2%",
        "-0.517",
        "+0.835",
        "+0.610",
        "87.8%",
    ]
    shown += ["5,453", "15,693", "31.0%", "89.2%", "mean tokens of a search, by problem set"]
    shown += ["How many integers &lt;n&gt; are there?", "Vieta", "tree search + PPM", "21,812"]
    for words in shown:
        assert words in page, words
    assert page.index(">1.5B<") < page.index(">7B<") < page.index(">72B<"), "in the order written"
    assert "<img" not in page and not re.search(r"<script|\son\w+=", page)
    files = {path.name for path in (tmp_path / "report" / "plots").iterdir()}
    assert {"rounds.png", "scaling_tokens.png", "scaling_trajectories.png", "theorems.png"} <= files


def test_shares_of_a_round_are_plain_numbers_with_n_and_interval_beside_them():
    cell = {"accuracy": 0.5, "n": 8, "ci": [0.2, 0.8]}
    found = {"round": 1} | room.round_fields("accuracy", cell) | room.round_fields("solved", cell)
    assert (found["accuracy"], found["n"], found["accuracy_ci"]) == (0.5, 8, [0.2, 0.8])
    assert (found["solved"], found["solved_n"], found["solved_ci"]) == (0.5, 8, [0.2, 0.8])
    assert room.round_cell(found, "accuracy") == cell == room.round_cell(found, "solved")
    assert room.round_cell(found | room.round_fields("solved", None), "solved") is None
    text = room.sections({"rounds": [found]}, NoPictures())[TITLES["rounds"]]
    assert "20.0% – 80.0%, n = 8" in text and "accuracy ci" not in text and "solved n" not in text
    assert room.headline({"rounds": [found]})["n"] == 8


@pytest.mark.parametrize("field", TITLES)
def test_a_section_stands_with_its_data_only(field):
    found = room.sections({field: evolution()[field]}, NoPictures())
    assert list(found) == [TITLES[field]]
    assert room.sections({field: {} if field != "rounds" else []}, NoPictures()) == {}


def test_what_is_missing_is_a_dash():
    found = {
        "rounds": [{"round": 0, "accuracy": 0.5}, {"round": 1, "search_accuracy": None, "pairs": 3}]
    }
    text = room.sections(found, NoPictures())[TITLES["rounds"]]
    row = re.search(r"<tr><td>pass@1(.*?)<tr>", text)[1]
    assert row == "<td><b>50.0%</b><td>–"
    assert "with search" not in text and "<td>pairs<td>–<td>3" in text
    assert room.headline(found)["accuracy"] == 0.5 and room.headline({}) is None
    assert room.sections({"backtracking": {"trees": 0, "count": 0}}, NoPictures())
    assert room.sections({"theorems": {"other": {"n": 0}}}, NoPictures())[TITLES["theorems"]] == ""


def test_texts_of_models_are_escaped():
    found = copy.deepcopy(evolution())
    every = " ".join(HOSTILE)
    example = found["backtracking"]["examples"][0]
    example |= {"problem": every, "gold": every, "answer": every, "page": "javascript:alert(1)"}
    example["left"][0]["text"] = example["taken"][0]["text"] = every
    example["images"] = [every]
    found["theorems"]["examples"][0] |= {"theorem": every, "text": every}
    found["scaling"] = {every: found["scaling"]["majority"]}
    found["rounds"][0]["policy"] = every
    text = "".join(room.sections(found, NoPictures()).values())
    assert not re.search(r"<(script|img|svg|iframe|style)|href='javascript|\u202e|\x00", text)
    assert "&lt;script&gt;" in text and "⟦U+202E⟧" in text


def test_an_unknown_field_is_named(tmp_path):
    write_text(tmp_path / "evolution.json", '{"round": []}')
    with pytest.raises(ValueError, match="no field 'round'; known: rounds, scaling"):
        pages.write_report(tmp_path)


@pytest.mark.parametrize("left", ["nothing", "training", "no levels", "no completions"])
def test_an_unfinished_or_bare_run_still_has_a_page(tmp_path, left):
    if left == "training":
        write_part(tmp_path / "metrics", "00000001-host0.jsonl", [{"step": 1, "loss": 1.0}])
    if left in ("no levels", "no completions"):
        cell = {"accuracy": 0.5, "n": 2, "ci": [0.1, 0.9], "correct": 1.0}
        result = cell | {"by_subject": {"unknown": cell}, "greedy": cell, "decoding": "greedy"}
        result |= {} if left == "no levels" else {"by_level": {"1": cell, "unknown": cell}}
        write_text(tmp_path / "eval" / "before" / "result.json", json.dumps(result))
    if left == "nothing":
        trees.write_tree_index([large_tree(9)], tmp_path / "report" / "trees")
    pages.write_report(tmp_path)
    page = (tmp_path / "report" / "index.html").read_text()
    assert ("href='trees/index.html'" in page) == (left == "nothing")
    assert ("has not finished" in page) and page.endswith("</html>")
    assert ("accuracy_by_level.png" in str(list(tmp_path.rglob("*.png")))) == (
        left == "no completions"
    )
