"""What cannot work is refused when a run starts; a start that came to nothing binds nobody."""

import json
from types import SimpleNamespace

import pytest
import step_case

from configs import evaluate as evaluate_config
from configs import evolve, grpo, ppm, search, sft, synthesis
from smallmath_jax.tasks import evolve as evolve_task
from smallmath_jax.tasks import policy, runs
from smallmath_jax.tasks.checks import check


@pytest.mark.parametrize("mode", ["tiny", "3b", "7b", "math1.5b", "math7b", "phi3"])
def test_every_mode_passes(mode):
    for module in (grpo, sft, evaluate_config, search, ppm, synthesis):
        check(module.get_config(mode))
    check(evolve.get_config(mode))
    evolve_task.check(evolve.get_config(mode))


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("grpo.denominator", "grup", "did you mean 'group'"),
        ("grpo.optimizer.name", "adam", "adamw, muon"),
        ("grpo.optimizer.learning_rate", 0.0, "above 0"),
        ("grpo.updates", 0, "at least 1"),
        ("grpo.updates", 33, "32 groups"),
        ("log.samples_every", 0, "at least 1"),
        ("checkpoint.every", 0, "at least 1"),
        ("prompt.grammar", "think_answr", "did you mean 'think_answer'"),
        ("compute_dtype", "foo", "float32, bfloat16"),
        ("grpo.row_length", 100, "prompt.max_tokens \\+ grpo.sampling.max_tokens = 64 \\+ 56"),
        ("eval.sampling.max_tokens", 100, "engine.cache_length is 128"),
        ("grpo.row_patches", 15, "grpo.row_patches is 15, .* vision.max_patches = 16"),
        ("eval.headline", "sampeld", "did you mean 'sampled'"),
        ("reward.preset", "papr", "did you mean 'paper'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_field(field, value, said):
    config = grpo.get_config("tiny")
    part = config
    *parents, last = field.split(".")
    for parent in parents:
        part = part[parent]
    part[last] = value
    with pytest.raises(ValueError, match=said) as told:
        check(config)
    assert field.split(".")[-1] in str(told.value)


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("evolve.selection", "step_verifed", "did you mean 'step_verified'"),
        ("evolve.guidance", ("terminal", "pmm", "ppm", "ppm"), "round 2: .*guidance='pmm'"),
        ("evolve.candidates", (5, 6, 0, 6), "round 3: search.candidates=0"),
        ("evolve.start", "bsae", "known are 'previous', 'base'"),
        ("ppm.loss", "ppmm", "did you mean 'ppm'"),
        ("search.stop", "decidd", "config.search: search.stop='decidd': known are"),
        ("eval.search.choose", "vote", "config.eval.search: .*choose='vote'"),
        ("pairs.descend", "al", "config.pairs: .*'al': known are all"),
        ("pairs.per_side", 0, "at least 1"),
        ("bootstrap.optimizer.schedule", "cosin", "did you mean 'cosine'"),
    ],
)
def test_a_typo_of_self_evolution_is_told_before_anything_is_loaded(field, value, said, tmp_path):
    config = evolve.get_config("tiny")
    config.model = "no-such-folder"  # would be refused later, in other words
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=said):
        evolve_task.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_start_that_came_to_nothing_binds_nobody(tmp_path):
    first, second = grpo.get_config("tiny"), grpo.get_config("tiny")
    first.grpo.data = ("no-such-file.jsonl",)
    with runs.open_run(first, str(tmp_path)):
        pass
    with runs.open_run(second, str(tmp_path)):
        (tmp_path / "sft").mkdir()
    assert json.loads((tmp_path / "config.json").read_text())["config"]["grpo"]["data"] == [
        "tiny:train"
    ]
    with pytest.raises(ValueError, match="grpo.data"), runs.open_run(first, str(tmp_path)):
        pass


def test_a_run_continues_on_another_machine_and_says_what_is_other(tmp_path, capsys):
    first, second = grpo.get_config("tiny"), grpo.get_config("tiny")
    with runs.open_run(first, str(tmp_path)):
        (tmp_path / "checkpoints").mkdir()
    second.update({"mesh": {"data": 2, "fsdp": 4}, "engine": {"slots": 16}, "remat": "full"})
    with runs.open_run(second, str(tmp_path)):
        pass
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "other" in line]
    for change in ("mesh.data (was 1, now 2)", "engine.slots (was 128, now 16)", "remat (was"):
        assert change in told
    second.grpo.group_size = 4
    with pytest.raises(ValueError, match="group_size"), runs.open_run(second, str(tmp_path)):
        pass


def test_a_frozen_name_that_is_none_is_refused():
    small = SimpleNamespace(model=step_case.make_model())
    config = grpo.get_config("tiny")
    config.freeze = "visoin/.*"
    with pytest.raises(ValueError, match="visoin.*text/"):
        policy._check_freeze(small, config)
    config.freeze = "vision/.*"
    policy._check_freeze(small, config)
    config.lora.rank = 4
    with pytest.raises(ValueError, match="lora.rank"):
        policy._check_freeze(small, config)
