"""Evaluate a model: greedy pass@1, n samples with pass@k and maj@k, by level and subject, with a report.

    python run.py --config=configs/evaluate.py --config.model=FOLDER --config.eval.problems="('math500',)"
    python run.py --config=configs/evaluate.py:tiny --config.init_from=workdirs/grpo-tiny
    python run.py --config=configs/evaluate.py:tiny --config.init_from=workdirs/evolve-tiny   # its last finished round

Problem sources: a JSON, JSONL or Parquet file, hf:NAME, tfds:NAME, gs://…, tiny:test, or a benchmark's name (math500,
math, aime2024, amc23, olympiadbench, college_math, gsm8k, gaokao2023en, math_vision). Several runs side by side:
--config.compare="('workdirs/a', 'workdirs/b')".
"""

from configs import common


def get_config(mode=None):
    mode = common.check_mode(mode)
    config = common.base("evaluate", mode)
    config.prompt.grammar = "auto"  # that of the run in init_from, else think_answer
    config.eval = common.evaluation(mode)
    config.compare = ()  # workdirs of other evaluations, shown side by side in the report
    return config
