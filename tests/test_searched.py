"""Test-time search as an evaluation: its numbers counted again from the trees on disk; stopped and continued."""

import collections
import dataclasses
import json

import driver_case as case
import pytest
from test_driver import Stop, make_driver
from test_report_evolution import NoPictures

from configs import evaluate as evaluate_config
from configs import search as search_config
from smallmath_jax.records import Problem, read_parts
from smallmath_jax.report import answers
from smallmath_jax.search.mcts import search_seeds
from smallmath_jax.search.vote import SCALES
from smallmath_jax.tasks import search as search_task
from smallmath_jax.tasks import searched, tree_parts
from smallmath_jax.tasks.checks import check
from smallmath_jax.tasks.driver import Judge

NEVER = 10**9
PROBLEMS = [
    Problem(f"p{n}", f"What is p{n}?", "345"[n % 3], level=n % 2 + 1, subject="Sums",
            meta={"set": "aime" if n < 3 else "amc"})
    for n in range(8)
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_prompts(monkeypatch):
    given = lambda problems, policy, config: (problems, [case.prompt(p.id) for p in problems], {})
    monkeypatch.setattr(search_task, "prompts_for", given)
    monkeypatch.setattr(tree_parts, "PART_TREES", 2)


def config_of(method, searches=5, **search):
    config = evaluate_config.get_config("tiny-steps")
    config.eval.update({"method": method, "searches": searches, "top_k": 3, "beam_width": 2})
    config.search.update({"rollouts": 4, "candidates": 3, "max_depth": 6} | search)
    config.judge, config.in_flight = "some/ppm", 3
    check(config)
    return config


def run(config, folder, stop=None, engine=None, judged=True, host=case.HOST):
    scale = SCALES["ppm"]
    judge = Judge(case.ScriptedEngine(), scale) if judged else None
    driver = make_driver(engine or case.ScriptedEngine(), host, judge)
    stop = stop or Stop(NEVER)
    return searched._searched(driver, PROBLEMS, config, folder, stop, scale if judged else None)


def answered(folder):
    """problem -> of each search, by seed: (answer, score) of the node it chose, or None."""
    seeds = search_seeds(0, 5)
    found = collections.defaultdict(lambda: [None] * len(seeds))
    for row in read_parts(folder / "trees"):
        for node in row["nodes"]:
            if row["chosen"] and node["tag"] == row["chosen"]:
                place = seeds.index(row["seed"])
                found[row["problem_id"]][place] = (node["answer"], node["score"])
    return found


def top_three(some):
    """The published protocol, written anew: of the 3 best by score the commonest, ties by sum of scores."""
    best = sorted((one for one in some if one), key=lambda one: -one[1])[:3]
    names = {name for name, _ in best}
    weigh = lambda name: (
        sum(one[0] == name for one in best), sum(one[1] for one in best if one[0] == name)
    )  # fmt: skip
    return max(names, key=weigh) if names else None


def test_numbers_are_those_of_the_trees_on_disk(tmp_path):
    result = run(config_of("mcts"), tmp_path)
    found = answered(tmp_path)
    gold = {problem.id: problem.answer for problem in PROBLEMS}
    right = {
        name: [one is not None and one[0] == gold[name] for one in found[name]] for name in gold
    }
    shares = {name: sum(row) / 5 for name, row in right.items()}
    assert result["search"]["accuracy"] == pytest.approx(sum(shares.values()) / 8)
    assert result["search"]["by_set"]["aime"]["accuracy"] == pytest.approx(
        sum(shares[f"p{n}"] for n in range(3)) / 3
    )
    published = result["votes"]["majority of the top 3 by PPM"]
    wins = {name: top_three(found[name]) == gold[name] for name in gold}
    assert published["accuracy"] == sum(wins.values()) / 8 == result["accuracy"]
    assert published["by_set"]["amc"]["accuracy"] == sum(wins[f"p{n}"] for n in range(3, 8)) / 5
    assert published["by_level"]["1"]["n"] == 4 and published["by_subject"]["Sums"]["n"] == 8
    assert result["votes"]["coverage"]["accuracy"] == sum(map(any, right.values())) / 8
    curve = result["scaling"]["complete searches, coverage"]
    for point, size in zip(curve, (1, 2, 4, 5), strict=True):
        assert point["accuracy"] == sum(any(row[:size]) for row in right.values()) / 8
    rows = list(read_parts(tmp_path / "trees"))
    assert len(rows) == 40 and all(not row["extra"]["settings"]["use_gold"] for row in rows)
    assert all(not node["verdict"] for row in rows for node in row["nodes"])  # never seen
    spent = sum(row["tokens"] for row in rows) / 40
    assert result["tokens"]["mean"] == pytest.approx(spent) and set(result["tokens"]["by_set"]) == {
        "aime",
        "amc",
    }
    first = [row for row in rows if row["seed"] == 0]
    leaves = [
        any(node["answer"] == gold[row["problem_id"]] for node in row["nodes"]) for row in first
    ]
    assert result["leaves"]["coverage"]["accuracy"] == sum(leaves) / 8
    assert {row["units"] for row in result["stopping"]} == {
        "rollouts of one search",
        "complete searches",
    }
    assert 0 < sum(wins.values()) < 8
    pages = sorted((tmp_path / "report" / "trees").glob("p*.html"))
    assert [page.name.split("-")[0] for page in pages] == [problem.id for problem in PROBLEMS]
    text = "".join(answers.sections({"evaluation": result}, NoPictures()).values())
    beside = answers.sections({"evaluation": {}, "another run": result}, NoPictures())
    assert beside and all(title.startswith("another run: ") for title in beside)
    for words in ("majority of the top 3 by PPM", "aime", "confident at 0.95", "tokens saved"):
        assert words in text


def test_stopped_and_continued_it_is_the_same_evaluation(tmp_path):
    whole = run(config_of("mcts", 2), tmp_path / "whole")
    for number in range(40):
        try:
            found = run(
                config_of("mcts", 2), tmp_path / "cut", Stop(30), case.ScriptedEngine(number)
            )
        except SystemExit as left:
            assert left.code == 143
        else:
            break
    assert number > 1 and found == whole


def test_an_evaluation_whose_searches_fail_is_not_finished_but_tried_again(tmp_path):
    async def gone(prefix, code):
        if "=5" in prefix and "=5" in code:
            raise OSError("the pipe is gone")
        return await case.run_program(prefix, code)

    host = dataclasses.replace(case.HOST, run_program=gone)
    with pytest.raises(RuntimeError, match="of 16 searches failed"):
        run(config_of("mcts", 2), tmp_path / "broken", host=host)
    found = run(config_of("mcts", 2), tmp_path / "broken")
    assert found == run(config_of("mcts", 2), tmp_path / "whole") and found["failed"] == 0


@pytest.mark.parametrize("judged", [True, False])
def test_chains_are_so_many_trajectories(tmp_path, judged):
    result = run(config_of("chains"), tmp_path, judged=judged)
    rows = list(read_parts(tmp_path / "trees"))
    assert len(rows) == 8
    right = []
    for row in rows:
        gold = next(one.answer for one in PROBLEMS if one.id == row["problem_id"])
        ends = {node["tag"].split(".")[1]: node for node in row["nodes"][1:]}  # the last of each
        assert len(ends) == 5
        right.append(
            [node["kind"] == "answer" and node["answer"] == gold for node in ends.values()]
        )
    assert result["search"]["accuracy"] == pytest.approx(sum(map(sum, right)) / 40)
    assert result["votes"]["coverage"]["accuracy"] == sum(map(any, right)) / 8
    written = sum(node["written"] for row in rows for node in row["nodes"])
    assert result["tokens"]["mean"] == pytest.approx(written / 40)
    assert ("PPM-weighted vote" in result["votes"]) == judged
    assert result["decoding"] == ("majority of the top 3 by PPM" if judged else "majority")


def test_beams_differ_by_seed_and_choose_by_score(tmp_path):
    result = run(config_of("beam", 2), tmp_path)
    rows = list(read_parts(tmp_path / "trees"))
    assert len(rows) == 16 and result["answers"] == "2 searches (beam)"
    for row in rows:
        scores = {n["tag"]: n["score"] for n in row["nodes"] if n["kind"] == "answer"}
        assert row["chosen"] == max(scores, key=scores.get, default="")
    assert result["search"]["n"] == 8
    # Its answers come by level: no share of "so many rollouts" and no early stop may be told of them
    assert "stopping" not in result
    assert all(name.startswith("complete searches") for name in result["scaling"])


def test_trajectories_in_one_go_run_their_programs(tmp_path):
    config = config_of("sample")
    config.eval.update({"samples": 3, "k": (1, 3), "headline": "sampled"})
    pairs = [(problem, case.prompt(problem.id)) for problem in PROBLEMS]
    result = searched._sampled(
        make_driver(case.ScriptedEngine()), pairs, config, tmp_path, Stop(NEVER), None
    )
    rows = list(read_parts(tmp_path / "completions"))
    assert len(rows) == 8 * 4 and {row["extra"]["status"] for row in rows} >= {"ok"}
    assert result["sampled"]["pass_at_k"]["3"] == result["votes"]["coverage"]["accuracy"]
    assert result["accuracy"] == result["sampled"]["accuracy"]
    assert set(result["votes"]["coverage"]["by_set"]) == {"aime", "amc"}


def test_an_evaluation_draws_as_its_own_settings_say(tmp_path, monkeypatch):
    config = config_of("sample")
    config.eval.update({"samples": 1, "k": (1,), "headline": "sampled"})
    config.eval.sampling.temperature, config.search.output_characters = 0.6, 1
    driver, seen = make_driver(case.ScriptedEngine()), set()
    generate = driver.generate

    async def watched(place, count, keys, limits, sampling):
        seen.add(sampling.temperature)
        return await generate(place, count, keys, limits, sampling)

    monkeypatch.setattr(driver, "generate", watched)
    pairs = [(problem, case.prompt(problem.id)) for problem in PROBLEMS]
    searched._sampled(driver, pairs, config, tmp_path, Stop(NEVER), None)
    assert seen == {0.0, 0.6}
    texts = [row["text"] for row in read_parts(tmp_path / "completions")]
    outputs = [text.partition("<output>")[2].partition("<")[0] for text in texts]
    assert max(map(len, outputs)) < len("ZeroDivisionError")  # clipped as the policy knows it


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"eval.method": "mtcs"}, "did you mean 'mcts'. known: sample, chains, mcts, beam"),
        ({"prompt.grammar": "think_answer"}, "code steps: set prompt.grammar=code_steps"),
        ({"judge": ""}, "needs config.judge"),
        ({"judge": "", "search.guidance": "terminal"}, "choose='value' needs config.judge"),
        ({"eval.method": "beam", "search.guidance": "terminal"}, "needs search.guidance='ppm'"),
        ({"search.use_gold": True}, "must not see the gold answers"),
        ({"eval.searches": 0}, "eval.searches is 0; it must be at least 1"),
    ],
)
def test_a_search_that_could_not_work_is_refused_at_the_start(changes, said):
    config = config_of("mcts")
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=said):
        check(config)


@pytest.mark.parametrize(
    ("judge", "guidance", "said"),
    [("RUN", "terminal", "would judge nothing"), ("", "ppm", "needs config.judge, the workdir")],
)
def test_a_judge_and_what_it_is_for_go_together(judge, guidance, said):
    config = search_config.get_config("tiny")
    config.judge, config.search.guidance = judge, guidance
    with pytest.raises(ValueError, match=said):
        check(config)


def test_a_search_without_gold_answers_is_no_search_to_learn_from():
    config = search_config.get_config("tiny")
    check(config)
    config.search.use_gold = False
    with pytest.raises(ValueError, match="to measure, run configs/evaluate.py"):
        check(config)


def test_published_numbers_of_the_test_protocol():
    config = evaluate_config.get_config("math7b-steps")
    assert (config.eval.searches, config.eval.top_k) == (64, 4)
    found = config.search
    assert (found.rollouts, found.candidates, found.guidance, found.use_gold) == (
        12,
        32,
        "ppm",
        False,
    )
    assert config.prompt.grammar == "code_steps" and config.mode == "math7b"
    json.dumps(config.to_dict())
