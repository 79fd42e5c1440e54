"""Self-evolution: noise, right answers by luck, selection, measures, and the whole of it at the smallest size."""

import asyncio
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import driver_case as case
import pytest

from smallmath_jax.data.converters import BENCHMARKS
from smallmath_jax.data.tiny import program, reinstantiate, tiny_problems, worked_solution
from smallmath_jax.data.tiny_noise import noisy_solution
from smallmath_jax.records import Node, Problem, Tree, read_parts
from smallmath_jax.search.vote import SCALES
from smallmath_jax.tasks import ballots
from smallmath_jax.tasks import evolve_measures as measures
from smallmath_jax.tasks.chains import program_of
from smallmath_jax.tasks.driver import Host
from smallmath_jax.tasks.recheck import recheck, relabel

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PROBLEMS = tiny_problems("train", 60, 0)


def executed(text):
    """What the program of a solution prints."""
    from search_case import run_snippet

    result = run_snippet("", program_of(text.partition("<output>")[0]))
    assert result.status == "ok", result.stderr_tail
    return result.stdout.strip()


# ---- noise


def test_noisy_solutions_are_wrong_programs_with_their_own_output():
    spoilt = 0
    for problem in PROBLEMS:
        text, wrong = noisy_solution(problem, 0.5, 0)
        shown = text.partition("<output>")[2].partition("<")[0]
        assert executed(text) == shown and f"\\boxed{{{shown}}}" in text
        assert (shown != problem.answer) == wrong
        assert wrong or text == worked_solution(problem, "code_steps")
        assert noisy_solution(problem, 0.5, 0) == (text, wrong)
        spoilt += wrong
    assert 18 <= spoilt <= 42
    assert not any(noisy_solution(problem, 0.0, 0)[1] for problem in PROBLEMS)
    with pytest.raises(ValueError, match="between 0 and 1"):
        noisy_solution(PROBLEMS[0], 1.5, 0)


# ---- right by luck


def tree_of(problem, programs):
    """A tree of whole programs below the root, a child and its answer each; all answers count as right."""
    nodes = [Node("0", "", [], 0, 0.0, "root", len(programs), float(len(programs)))]
    for number, code in enumerate(programs, 1):
        tag = f"0.{number}"
        step = Node(tag, f"<code>\n{code}\n<end_of_code>", [1], 1, -1.0, "open", 1, 1.0)
        nodes.append(dataclasses.replace(step, status="ok", output=problem.answer))
        leaf = Node(f"{tag}.1", "answer", [2], 1, -1.0, "answer", 1, 1.0)
        nodes.append(dataclasses.replace(leaf, answer=problem.answer, verdict="correct"))
    return Tree(problem.id, problem.problem, problem.answer, nodes)


def test_programs_that_were_right_by_luck_are_found_out():
    problem = next(one for one in PROBLEMS if one.template == "buy")
    right = "\n".join(program(problem))
    a, b = problem.meta["quantities"].values()
    other = reinstantiate(problem, 0).meta["quantities"]
    lucky = right.replace("a+b", f"a+{b}" if b not in (0, other["b"]) else f"{a}+b")
    terse = f"print({problem.answer})"
    tree = tree_of(problem, [right, lucky, terse])
    (after,), counts = recheck([tree], {problem.id: problem}, case.HOST, 3)
    assert counts == {"right_answers": 3, "lucky": 2}
    by_tag = {node.tag: node for node in after.nodes}
    assert [by_tag[f"0.{n}.1"].verdict for n in (1, 2, 3)] == ["correct", "wrong", "wrong"]
    assert [by_tag[f"0.{n}"].q_value for n in (1, 2, 3)] == [1.0, -1.0, -1.0]
    assert by_tag["0"].value_sum == -1.0 and by_tag["0"].visit_count == 3
    assert recheck([tree], {problem.id: problem}, case.HOST, 0)[0] == [tree]
    from_a_file = dataclasses.replace(problem, template="", meta={})  # tiny.jsonl, say
    assert from_a_file.source == "tiny"
    assert recheck([tree], {problem.id: from_a_file}, case.HOST, 3)[0] == [tree]


def test_relabelling_nothing_changes_nothing():
    tree = tree_of(PROBLEMS[0], ["x=1"])
    assert relabel(tree, []) is tree


def test_programs_are_run_once_for_all_trees():
    problem, ran = PROBLEMS[0], []

    async def run_program(prefix, code):
        ran.append(code)
        return await case.run_program(prefix, code)

    tree = tree_of(problem, ["\n".join(program(problem))] * 2)
    host = Host(run_program, case.grade)
    _, counts = recheck([tree, tree], {problem.id: problem}, host, 2)
    assert counts == {"right_answers": 4, "lucky": 0} and len(ran) == 2


# ---- measures


def row(problem, sample, answer, gold, score=None, log_prob=-1.0, decoding="sampled"):
    verdict = "no_answer" if answer is None else "correct" if answer == gold else "wrong"
    extra = {"decoding": decoding, "score": score, "log_prob": log_prob, "written": 10}
    return {
        "problem_id": problem,
        "sample": sample,
        "answer": answer,
        "verdict": verdict,
        "level": 1,
        "subject": "Algebra",
        "token_ids": [1],
        "extra": extra | {"set": "tiny", "status": "ok"},
    }


ROWS = [
    *(row("p", 0, "1", "1", decoding="greedy"), row("q", 0, "2", "3", decoding="greedy")),
    *(row("p", 0, "1", "1", 0.9, -1), row("p", 1, "2", "1", -0.9, -3), row("p", 2, "2", "1", -0.9, -3)),
    *(row("q", 0, "2", "3", 0.1, -1), row("q", 1, None, "3"), row("q", 2, "3", "3", 0.2, -2)),
]  # fmt: skip


def test_measures_of_trajectories_by_hand():
    found = measures.chain_measures(ROWS, 3, SCALES["ppm"])
    assert found["greedy"]["accuracy"] == 0.5
    assert found["sampled"]["accuracy"] == pytest.approx(2 / 6)
    at_n = {name: one["accuracy"] for name, one in found["at_n"].items()}
    assert at_n[ballots.MAJORITY] == 0.5  # p: 2 of 3 say 2; q: a tie, and 3 has the higher score
    assert at_n[ballots.BEST] == 1.0 and at_n[ballots.WEIGHTED] == 1.0
    assert at_n[ballots.LIKELY] == 0.5
    assert found["coverage"]["accuracy"] == 1.0 and found["tokens"] == 10.0
    assert found["auc"] == {"auc": 1.0, "problems": 2}
    assert found["auc_log_prob"]["auc"] == 0.5
    assert set(measures.chain_measures(ROWS, 3, None)["at_n"]) == {ballots.MAJORITY, ballots.LIKELY}


def test_numbers_of_each_problem_set():
    other = [one | {"extra": one["extra"] | {"set": "aime", "written": 30}} for one in ROWS[4:]]
    found = measures.chain_measures([*ROWS[:4], *other], 3, SCALES["ppm"])["by_set"]
    assert list(found) == ["aime", "tiny"]
    alone = measures.chain_measures(other, 3, SCALES["ppm"])
    assert all(found["aime"][name] == alone[name] for name in found["aime"])
    assert (found["aime"]["tokens"], found["tiny"]["tokens"]) == (30.0, 10.0)


def leaf_tree(*leaves, rollouts=4, seed=0, problem="p"):
    """A graded tree whose answers hang below the root: (answer, score, log_prob, rollout, verdict)."""
    nodes = [Node("0", "", [], 0, 0.0, "root", len(leaves), 0.0)]
    for number, (answer, score, log_prob, rollout, verdict) in enumerate(leaves, 1):
        node = Node(f"0.{number}", "", [1], 1, log_prob, "answer", 1, score, score, answer)
        nodes.append(dataclasses.replace(node, verdict=verdict, rollout=rollout))
    best = max(nodes[1:], key=lambda node: node.score).tag if leaves else ""
    where = {"rollouts": rollouts, "tokens": 40, "seed": seed}
    return Tree(problem, "", "1", nodes, chosen=best, **where)


def group(*trees):
    return [measures.searched(tree, Problem(tree.problem_id, "", "1")) for tree in trees]


RIGHT, WRONG = "correct", "wrong"


def test_answers_of_a_search_vote_by_odds_and_probability():
    tree = leaf_tree(
        ("2", 0.30, -9.0, 0, WRONG), ("1", 0.25, -1.0, 1, RIGHT), ("2", 0.28, -9.0, 3, WRONG)
    )
    found = measures.search_measures([group(tree)], SCALES["ppm"])
    assert found["search_accuracy"]["accuracy"] == 1.0
    assert found["search_choice"]["accuracy"] == found["search_majority"]["accuracy"] == 0.0
    assert found["search_coverage"]["accuracy"] == 1.0 and found["search_answers"] == 3
    curves = measures.all_scaling([], [group(tree)], SCALES["ppm"], 4)
    points = curves[measures.SEARCH_VOTE]
    assert [one["accuracy"] for one in points] == [0.0, 1.0, 1.0]
    assert [one["trajectories"] for one in points] == [1, 2, 3]
    assert [one["tokens"] for one in points] == [20.0, 30.0, 40.0]


def test_complete_searches_give_one_answer_each():
    trees = [
        leaf_tree(("2", 0.9, -1.0, 0, WRONG), ("1", 0.1, -1.0, 1, RIGHT)),
        leaf_tree(("1", 0.5, -1.0, 0, RIGHT), ("2", 0.4, -1.0, 1, WRONG), seed=1),
        leaf_tree(("1", 0.3, -9.0, 0, RIGHT), seed=2),
        leaf_tree(seed=3),
    ]
    case = measures.searches_case(group(*trees))
    assert [(one.ballot.answer, one.unit) for one in case.answers] == [("2", 0), ("1", 1), ("1", 2)]
    assert case.spent == (40, 80, 120, 160) and case.units == 4
    curves = measures.all_scaling([], [group(*trees)], SCALES["ppm"], 2)
    of = lambda name: [one["accuracy"] for one in curves[f"complete searches, {name}"]]
    assert of("majority") == [0, 0, 1]  # of 1, 2 and 4 searches: at 2 a tie, and 2 scores higher
    assert of("majority of the top 2 by PPM") == [0, 0, 0]
    assert of("coverage") == [0, 1, 1]
    one = measures.search_measures([group(*trees)], SCALES["ppm"])
    assert one["search_choice"]["accuracy"] == 0 and one["search_coverage"]["accuracy"] == 1


def test_what_cannot_be_graded_is_left_out_and_counted():
    rows = [
        *(row("p", 0, "1", "1"), row("p", 1, "1", "1")),
        *(row(name, n, "2", "?") | {"verdict": "timeout"} for name in "qr" for n in (0, 1)),
        *(row("s", 0, "2", "?") | {"verdict": "unparsable_gold"}, row("s", 1, "1", "1")),
    ]
    found = measures.chain_measures(rows, 2, None)
    for name in (ballots.MAJORITY, ballots.LIKELY):
        cell = found["at_n"][name]
        assert (cell["accuracy"], cell["n"], cell["ungradable"]) == (1.0, 1, 3)
    coverage = found["coverage"]  # of s one is known to be right
    assert (coverage["accuracy"], coverage["n"], coverage["ungradable"]) == (1.0, 2, 2)
    trees = [
        [*group(leaf_tree(("2", 0.3, -1.0, 0, "timeout"), problem="p"))],
        [*group(leaf_tree(("1", 0.3, -1.0, 0, RIGHT), problem="q"))],
        [*group(leaf_tree(problem="r"))],  # no answer at all is wrong
    ]
    searched = measures.search_measures(trees, SCALES["ppm"])
    for name in ("accuracy", "choice", "majority", "coverage"):
        cell = searched[f"search_{name}"]
        assert (cell["accuracy"], cell["n"], cell["ungradable"]) == (0.5, 2, 1)


def test_scaling_counts_samples_and_tokens():
    curves = measures.all_scaling([one for one in ROWS if one["sample"] < 2], [], None, 4)
    points = curves[ballots.MAJORITY]
    assert [(one["trajectories"], one["tokens"]) for one in points] == [(1, 10.0), (2, 20.0)]
    assert [one["accuracy"] for one in curves[ballots.COVERAGE]] == [0.5, 0.5]
    assert measures.sample_cases([*ROWS, *ROWS]) == measures.sample_cases(ROWS)


def test_early_stops_by_hand():
    # 1, 1, 2, 1, 2, 2 of 8: after 4 answers 3 against 1, and never decided before the end
    answers = [("1", RIGHT), ("1", RIGHT), ("2", WRONG), ("1", RIGHT), ("2", WRONG), ("2", WRONG)]
    tree = leaf_tree(*((a, 0.1, -1.0, n, v) for n, (a, v) in enumerate(answers)), rollouts=6)
    settings = {"rollouts": 8, "answers_kept": 1}
    tree = dataclasses.replace(tree, extra={"settings": settings}, tokens=70)
    case = measures.searched(tree, Problem("p", "", "1")).leaves
    vote = ballots.measures((ballots.MAJORITY,), None)
    rows = {one["stop"]: one for one in ballots.stopping([case], vote, "rollouts")}
    assert rows["decided"]["tokens_saved"] == 0 and rows["decided"]["units_taken"] == 6
    assert rows["confident at 0.8"]["units_taken"] == 2  # 1 - 0.5 ** 3 = 0.875
    assert rows["confident at 0.8"]["tokens"] == 30 and rows["confident at 0.8"]["accuracy"] == 1
    assert rows["confident at 0.8"]["tokens_saved"] == pytest.approx(4 / 7)
    assert rows["confident at 0.9"]["units_taken"] == 6


def test_a_search_that_stops_early_is_the_full_one_cut_where_it_would_have_stopped():
    """Against mcts.search itself, with its own stop."""
    from search_case import append, encode, problem
    from test_search_mcts import fake_run, fake_score, latent

    from smallmath_jax.search.mcts import search_now
    from smallmath_jax.search.settings import SearchSettings

    stopped = 0
    for number in range(12):
        policy = {"generate": latent(number), "append": append, "encode": encode}
        policy |= {"run_code": fake_run, "score": fake_score}
        fields = {"rollouts": 8, "candidates": 4, "guidance": "ppm", "use_gold": False}
        fields |= {"choose": "votes", "seed": number}
        whole = search_now(problem(), "", settings=SearchSettings(**fields), **policy)
        case = measures.searched(whole, problem()).leaves
        for stop, confidence in (("decided", 0.95), ("confident", 0.8)):
            settings = SearchSettings(**fields, stop=stop, confidence=confidence)
            early = search_now(problem(), "", settings=settings, **policy)
            end = ballots._end(case, ballots._leads(case), stop, confidence)
            assert end == early.rollouts
            kept = [one.ballot.tag for one in ballots.first(case, end).answers]
            assert kept == [node.tag for node in early.nodes if node.kind == "answer"]
            stopped += early.stopped in ("decided", "confident")
    assert stopped > 4


# ---- the whole


SHORT = (
    "--config.bootstrap.solutions=900",
    "--config.bootstrap.steps=250",
    "--config.evolve.per_round=24",
    "--config.evolve.rounds=2",
    "--config.evolve.rollouts=(2,2)",
    "--config.evolve.candidates=(4,3)",
    "--config.evolve.guidance=('terminal','ppm')",
    "--config.evolve.more_from=2",
    "--config.evolve.more=(4,)",
    "--config.evolve.more_problems=3",
    "--config.evolve.also_from=2",
    "--config.sft.steps=3",
    "--config.ppm.steps=3",
    "--config.eval.limit=6",
    "--config.eval.samples=2",
    "--config.eval.final_samples=4",
    "--config.eval.search_problems=2",
    "--config.eval.final_search_problems=3",
    "--config.eval.final_searches=2",
    "--config.eval.search.rollouts=2",
    "--config.eval.search.candidates=3",
    "--config.engine.slots=16",
)


def evolve(workdir, *more):
    words = [sys.executable, "run.py", "--config=configs/evolve.py:tiny", f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*words, *SHORT, *more], cwd=ROOT, capture_output=True, text=True, env=environment
    )


@pytest.mark.full
def test_two_rounds_end_to_end_and_a_second_start_does_nothing_again(tmp_path):
    told = evolve(tmp_path)
    assert told.returncode == 0, told.stderr[-3000:]
    assert "bootstrap: pass@1" in told.stdout and "round 2: pass@1" in told.stdout
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [one["round"] for one in report["rounds"]] == [0, 1, 2]
    last = report["rounds"][-1]
    assert {"accuracy", "search_accuracy", "solved", "coverage_by_level"} <= set(last)
    for found in report["rounds"]:
        assert set(found) == set(last)
        for name in ("accuracy", "search_accuracy", "solved"):
            assert isinstance(found[name], float) or found["round"] == 0 and name != "accuracy"
    assert report["rounds"][0]["search_accuracy"] is report["rounds"][0]["solved"] is None
    assert set(last["tokens_by_set"]) == set(last["search_by_set"]) == {"tiny:test"}
    assert report["stopping"] and "complete searches, majority" in report["scaling"]
    assert report["scaling"] and report["reward_models"] and "backtracking" in report
    assert "+ ORM" in report["reward_models"]["round 2"]
    assert "+ ORM" not in report["reward_models"]["round 1"]
    for stage in ("search", "select", "sft", "ppm", "evaluate", "orm", "orm/scores"):
        assert (tmp_path / "round_2" / stage / "done.json").exists()
    rows = list(read_parts(tmp_path / "round_1" / "search" / "trees"))
    assert len(rows) == len({one["problem_id"] for one in rows}) == 24
    before = {path: path.stat().st_mtime for path in (tmp_path / "round_2").rglob("done.json")}
    again = evolve(tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert before == {path: path.stat().st_mtime for path in before}
    assert "continuing" not in again.stdout


def test_rounds_that_are_not_described_are_refused():
    from configs import evolve as config
    from smallmath_jax.tasks.evolve import check

    described = config.get_config("tiny")
    check(described)
    described.evolve.rounds = 5
    with pytest.raises(ValueError, match="rollouts has 4 entries for 5 rounds"):
        check(described)
    described = config.get_config("math7b")
    described.evolve.guidance = ("ppm",) * 4
    with pytest.raises(ValueError, match="first round has no preference model"):
        check(described)


def test_defaults_are_rstar_maths():
    """Design section 4, table of defaults and the line on search (rStar-Math, section 3.4)."""
    from configs import evolve as config

    found = config.get_config("math7b")
    assert found.evolve.rollouts == (8, 16, 16, 16) and found.evolve.candidates == (5, 8, 8, 16)
    assert found.evolve.guidance == ("terminal", "terminal", "ppm", "ppm")
    assert tuple(found.evolve.more) == (64, 128) and found.evolve.more_from == 4
    assert (found.search.exploration, found.search.max_depth) == (2.0, 16)
    assert (found.eval.search.rollouts, found.eval.search.candidates) == (12, 32)
    assert (found.sft.optimizer.learning_rate, found.sft.optimizer.schedule) == (7e-6, "linear")
    assert (found.sft.rows, found.sft.row_length, found.sft.epochs) == (128, 4096, 2)
    phi = config.get_config("phi3").sft.optimizer
    assert (phi.learning_rate, phi.schedule) == (5e-6, "cosine")
    ppm = found.ppm
    assert (ppm.pairs, ppm.max_tokens, ppm.epochs, ppm.dropout) == (512, 2048, 1, 0.1)
    assert (ppm.optimizer.learning_rate, ppm.optimizer.schedule) == (7e-6, "linear")
    assert ppm.tanh_in_loss is False and found.evolve.trajectories == 2
    assert (found.eval.final_searches, found.eval.top_k) == (64, 4)
    benchmarks = ("math500", "math", "aime2024", "amc23", "olympiadbench", "college_math")
    assert found.eval.problems == (*benchmarks, "gsm8k", "gaokao2023en")
    assert set(found.eval.problems) <= set(BENCHMARKS) & set(found.data.decontaminate)


# ---- whole trajectories


def test_trajectories_without_search_run_their_programs():
    from smallmath_jax.records import Sampling
    from smallmath_jax.search.settings import SearchSettings
    from smallmath_jax.tasks.chains import follow
    from smallmath_jax.tasks.driver import Driver

    engine, sampling, settings = case.ScriptedEngine(), Sampling(), SearchSettings()
    driver = Driver(
        case.Policy(), engine, case.HOST, grammar="code_steps", sampling=sampling, max_tokens=16
    )
    chains = []

    def job(name):
        async def walk():
            root = driver.open(case.prompt(name))
            chains.append(await follow(driver, root, (name,), sampling, 100, settings))

        return walk

    names = [f"c{number}" for number in range(6)]
    asyncio.run(driver.run(map(job, names), 4, lambda _: None))
    assert len(chains) == 6
    for chain in chains:
        shown = chain.text.partition("<output>")[2].partition("<")[0]
        if chain.status == "ok":
            assert chain.answer == shown == executed(chain.text)
        assert chain.text == case.TOKENS.tokenizer.decode(chain.token_ids)
        assert engine.paths[chain.place.node] == tuple(chain.token_ids)
        assert 0 < chain.written < len(chain.token_ids)
