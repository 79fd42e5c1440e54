"""Our side: run.py with the settings of reward.py; writes OUT/ours-SEED.json.

python benchmarks/grpo_vs_trl/ours.py OUT --seed 0
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from reward import SETTINGS  # noqa: E402

from smallmath_jax.records import read_parts  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    workdir = out / f"ours-{arguments.seed}"
    fields = {
        "model": out / "start",
        "seed": arguments.seed,
        "cold_start": False,
        "prompt.system": "",
        "export": False,
        "eval.before": False,
        "eval.after": False,
        "grpo.data": f"('{out}/problems.jsonl',)",
        "grpo.problems": 0,
        "grpo.steps": SETTINGS["steps"],
        "grpo.prompts": SETTINGS["prompts"],
        "grpo.group_size": SETTINGS["group_size"],
        "grpo.sampling.max_tokens": SETTINGS["max_tokens"],
        "grpo.updates": 1,
        "grpo.denominator": "batch",
        "grpo.epsilon_low": SETTINGS["epsilon"],
        "grpo.epsilon_high": SETTINGS["epsilon"],
        "grpo.optimizer.learning_rate": SETTINGS["learning_rate"],
        "grpo.optimizer.warmup_steps": 0,
        "grpo.optimizer.clip_norm": SETTINGS["clip_norm"],
        "reward.function": "reward:for_ours",
        "reward.truncated": "score",
        "checkpoint.every": 1000,
    }
    command = [sys.executable, "run.py", "--config=configs/grpo.py:tiny", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    started = time.time()
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    rewards = [
        row["reward"]
        for row in sorted(read_parts(workdir / "metrics"), key=lambda row: row["step"])
    ]
    record = {
        "rewards": rewards,
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.time() - started,
    }
    (out / f"ours-{arguments.seed}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
