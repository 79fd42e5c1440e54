"""Marks of a grammar in steps are tokens of their own: their rows, what may be sampled, restoring and exporting."""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from smallmath_jax.data.prompts import GRAMMARS, STEP_MARKS
from smallmath_jax.data.tokens import load_tokens
from smallmath_jax.tasks import export
from smallmath_jax.tasks.policy import load_policy, make_mesh, newest_checkpoints, run_config

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from configs import search as search_config  # noqa: E402


@pytest.fixture(scope="module")
def policies():
    """With marks as tokens, and without."""
    config = search_config.get_config("tiny")
    mesh = make_mesh(config)
    made = load_policy(config, mesh)
    config.prompt.step_tokens = False
    return made, load_policy(config, mesh)


def test_new_rows_are_the_mean_of_the_others(policies):
    marked, plain = policies
    rows, before = np.asarray(marked.model.text.embed[...]), np.asarray(plain.model.text.embed[...])
    fresh = sorted(marked.tokens.step_ids.values())
    assert fresh == list(range(len(plain.tokens.tokenizer), len(plain.tokens.tokenizer) + 7))
    mean = before[: len(plain.tokens.tokenizer)].mean(0)
    np.testing.assert_allclose(rows[fresh], np.tile(mean, (7, 1)), atol=1e-6)
    kept = np.delete(np.arange(len(rows)), fresh)
    np.testing.assert_array_equal(rows[kept], before[kept])


def test_marks_may_be_sampled_and_are_one_token(policies):
    marked, plain = policies
    fresh = list(marked.tokens.step_ids.values())
    assert not np.isin(fresh, marked.tokens.banned_ids).any()
    assert np.isin(fresh, plain.tokens.banned_ids).all()
    for mark in STEP_MARKS:
        assert len(marked.tokens.tokenizer.encode(mark)) == 1
        assert len(plain.tokens.tokenizer.encode(mark)) > 1
    assert plain.tokens.step_ids == {}


def test_a_grammar_without_marks_changes_nothing():
    config = search_config.get_config("tiny")
    config.prompt.grammar = "think_answer"
    assert not GRAMMARS["think_answer"].marks
    made = load_policy(config, make_mesh(config))
    assert made.tokens.step_ids == {} and jnp.isfinite(made.model.text.embed[...]).all()


def test_an_exported_folder_knows_the_marks(policies, tmp_path):
    marked, _ = policies
    export.export_policy(marked, tmp_path / "out")
    tokens = load_tokens(tmp_path / "out")
    for mark, number in marked.tokens.step_ids.items():
        assert tokens.tokenizer.encode(mark) == [number]
    config = search_config.get_config("tiny")
    config.model = str(tmp_path / "out")
    again = load_policy(config, make_mesh(config))
    assert again.tokens.step_ids == marked.tokens.step_ids
    np.testing.assert_array_equal(again.model.text.embed[...], marked.model.text.embed[...])


def test_a_stage_of_a_run_is_found_with_its_config(tmp_path):
    (tmp_path / "round_2" / "sft" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "round_1" / "sft" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "round_2" / "evaluate").mkdir()
    (tmp_path / "round_2" / "evaluate" / "done.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"config": {"model": "tiny"}}')
    stage = tmp_path / "round_2" / "sft"
    assert run_config(str(stage)) == {"model": "tiny"}
    assert newest_checkpoints(str(stage)) == newest_checkpoints(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no config.json"):
        run_config(str(tmp_path / "round_2"))
