"""The configs hold the papers' numbers, and a typo in a flag or a mode is told with the nearest names."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TASKS = ("sft", "grpo", "evaluate", "solve", "export", "search", "ppm", "evolve", "synthesis")
MODES = ("tiny", "3b", "7b", "math1.5b", "math7b", "phi3")


def load(task, mode=None):
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(f"config_{task}", ROOT / "configs" / f"{task}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(mode)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mode", MODES)
def test_every_config_has_every_mode(task, mode):
    config = load(task, mode)
    assert (config.task, config.mode) == (task, mode)


def test_defaults_are_small_math_r1s():
    """Design section 4, table of defaults (Small-Math-R1, sections 3.2 and 3.3)."""
    config = load("grpo")
    assert config.model == "Qwen/Qwen2.5-VL-3B-Instruct"
    sft = config.sft
    assert (sft.optimizer.learning_rate, sft.optimizer.schedule) == (1e-5, "cosine")
    assert (sft.rows, sft.row_length, sft.epochs) == (128, 4096, 2)
    assert (sft.optimizer.weight_decay, sft.optimizer.clip_norm) == (0.1, 1.0)
    grpo = config.grpo
    assert (grpo.optimizer.learning_rate, grpo.optimizer.schedule) == (1e-6, "constant")
    assert grpo.optimizer.warmup_steps == 10
    assert (grpo.prompts, grpo.group_size) == (64, 8)
    assert (config.prompt.max_tokens, grpo.sampling.max_tokens) == (1024, 2048)
    assert (grpo.epsilon_low, grpo.epsilon_high, grpo.inner_epochs) == (0.2, 0.2, 1)
    assert (grpo.sampling.temperature, grpo.sampling.top_p) == (1.0, 1.0)
    assert (grpo.denominator, grpo.kl_beta) == ("group", 0.0)
    reward = config.reward
    assert (reward.preset, reward.r0, reward.r1, reward.r2, reward.ratio) == ("paper", 1, 1, 1, 0.5)
    assert (reward.target_length, reward.curve, reward.truncated) == (512, "linear", "mask")


def test_a_misspelt_mode_gets_the_nearest():
    told = run("--config=configs/grpo.py:tinny")
    assert told.returncode != 0
    assert "did you mean tiny" in told.stderr and "Traceback" not in told.stderr


def test_a_misspelt_field_gets_the_nearest():
    told = run("--config=configs/grpo.py:tiny", "--config.grpo.group_sise=4")
    assert told.returncode != 0
    assert "did you mean grpo.group_size" in told.stderr and "Traceback" not in told.stderr


def test_a_missing_config_lists_those_there_are():
    told = run("--config=configs/gpro.py")
    assert told.returncode != 0 and "grpo.py" in told.stderr
