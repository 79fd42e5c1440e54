"""Evaluate a model: greedy pass@1, n samples with pass@k and maj@k, by level and subject, with a report.

    python run.py --config=configs/evaluate.py --config.model=FOLDER --config.eval.problems="('math500',)"
    python run.py --config=configs/evaluate.py:tiny --config.init_from=workdirs/grpo-tiny
    python run.py --config=configs/evaluate.py:tiny --config.init_from=workdirs/evolve-tiny   # its last finished round

Problem sources: a JSON, JSONL or Parquet file, hf:NAME, tfds:NAME, gs://…, tiny:test, or a benchmark's name (math500,
math, aime2024, amc23, olympiadbench, college_math, gsm8k, gaokao2023en, math_vision). Several runs side by side:
--config.compare="('workdirs/a', 'workdirs/b')".
"""

from configs import common, search


def get_config(mode=None):
    mode = common.check_mode(mode)
    config = common.base("evaluate", mode)
    config.prompt.grammar = "auto"  # that of the run in init_from, else think_answer
    config.eval = common.evaluation(mode)
    config.sandbox = search.sandbox()  # for a policy that writes code steps
    if mode == "tiny":
        config.sandbox.modules = ()
        config.eval.sampling.max_tokens = 80  # code steps are longer
        config.engine.cache_length = 160
    config.compare = ()  # workdirs of other evaluations, shown side by side in the report
    return config
