"""Reward models beside a round's own: one table of pass@1, + ORM, + PPM, on the same trajectories."""

import math
import types

import driver_case as case
import pytest
from test_configs import load
from test_evolve import row

from smallmath_jax.records import read_parts, write_part
from smallmath_jax.search.vote import scale_of
from smallmath_jax.tasks import evolve, evolve_rivals
from smallmath_jax.tasks.driver import WORST

NAMES = [f"p{number}" for number in range(20)]


def completion(name, sample, answer, log_prob=-1.0):
    """A trajectory that the round's own model scored 0.5 each."""
    found = row(name, sample, answer, "4", score=0.5, log_prob=log_prob)
    return found | {"token_ids": [ord(name[-1]), sample, 7]}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    given = lambda problems, policy, config: (problems, [case.prompt(p.id) for p in problems], {})
    monkeypatch.setattr(evolve_rivals, "prompts_for", given)
    monkeypatch.setattr(evolve_rivals, "with_pixels", lambda prompt, problem, policy: prompt)
    monkeypatch.setattr(evolve_rivals, "engine_weights", lambda model, config: model)
    config = load("evolve", "tiny")
    config.eval.samples = 3
    rows = [completion(name, n, "4" if n == 1 else f"5{n}") for name in NAMES for n in range(5)]
    rows += [row(name, 0, "4", "4", decoding="greedy") for name in NAMES]
    rows[2]["answer"] = None  # p0's third sample says nothing
    write_part(tmp_path / "round_4" / "evaluate" / "completions", "00000-host0.jsonl", rows)
    engine = case.ScriptedEngine()
    engine.set_weights = lambda model, version: None
    return types.SimpleNamespace(
        config=config,
        tests=[case.problem(name) for name in NAMES],
        scorer=types.SimpleNamespace(engine=engine),
        stop=types.SimpleNamespace(requested=False, exit_code=143),
        round_folder=lambda number: tmp_path / f"round_{number}",
    )


MODEL = types.SimpleNamespace(model=None)


def test_every_answered_sample_is_scored_by_its_own_path(bench):
    record = evolve_rivals.score_stage(bench, 4, "orm", MODEL)
    rows = list(read_parts(bench.round_folder(4) / "orm" / "scores"))
    assert len(rows) == record["scored"] == 3 * len(NAMES) - 1
    for one in rows:
        path = (ord(one["problem_id"][-1]), one["sample"], 7)
        raw = (sum(path) % 21 - 10) / 5.0  # as the scripted engine scores it
        assert one["score"] == pytest.approx(math.tanh(raw / scale_of("orm").squash))
    assert not bench.scorer.engine.paths, "nothing is left behind"
    again = evolve_rivals.score_stage(bench, 4, "orm", None)  # finished: nothing is scored again
    assert again["best"]["accuracy"] == record["best"]["accuracy"]
    columns = evolve_rivals.row(bench, 4)
    assert columns == {"+ ORM": again["best"], "+ ORM-weighted vote": again["weighted"]}
    assert evolve_rivals.row(bench, 3) == evolve_rivals.row(bench, 0) == {}


def test_a_path_without_room_scores_worst(bench):
    bench.scorer.engine.cache_length = 7  # five of the prompt, three of the trajectory
    evolve_rivals.score_stage(bench, 4, "orm", MODEL)
    rows = list(read_parts(bench.round_folder(4) / "orm" / "scores"))
    assert {one["score"] for one in rows} == {WORST}


def test_a_rivals_vote_weighs_by_its_own_odds():
    """Best of N takes its highest score; in the vote one answer at odds of e^3 beats two at odds of 1 together."""
    rows = [completion("p1", n, answer) for n, answer in enumerate(("4", "5", "5"))]
    scores = lambda *raw: [
        {
            "problem_id": "p1",
            "sample": n,
            "score": math.tanh(one / scale_of("orm").squash),
        }
        for n, one in enumerate(raw)
    ]
    told = lambda *raw: {
        name: evolve_rivals.measures(rows, scores(*raw), 3, scale_of("orm"))[name]["accuracy"]
        for name in ("best", "weighted")
    }
    assert told(3.0, 0.0, 0.0) == {"best": 1.0, "weighted": 1.0}
    assert told(0.5, 0.0, 0.0) == {"best": 1.0, "weighted": 0.0}  # e^0.5 < 2
    assert told(-1.0, 0.0, 0.0) == {"best": 0.0, "weighted": 0.0}


def test_which_rounds_have_rivals_and_which_losses_are_refused():
    config = load("evolve", "tiny")
    assert [evolve_rivals.losses_of(config, number) for number in (3, 4)] == [(), ("orm",)]
    assert load("evolve", "math7b").evolve.also_train == ()
    evolve.check(config)
    for loss in ("ppm", "prm"):
        config.evolve.also_train = (loss,)
        with pytest.raises(ValueError, match=f"'{loss}' is no loss beside ppm.loss='ppm'"):
            evolve.check(config)


def test_a_rival_reads_as_many_tokens_as_the_rounds_own_model(bench):
    folder = bench.round_folder(4) / "ppm"
    folder.mkdir()
    (folder / "result.json").write_text('{"tokens": 1234}')
    changed = evolve_rivals.rival_config(bench, 4, "orm")
    assert (changed.ppm.loss, changed.ppm.tokens) == ("orm", 1234)
    assert (bench.config.ppm.loss, bench.config.ppm.tokens) == ("ppm", 0)
