"""Evaluate a model: greedy pass@1, n samples with pass@k and maj@k, or test-time search; by set, level and subject.

    python run.py --config=configs/evaluate.py --config.model=FOLDER --config.eval.problems="('math500',)"
    python run.py --config=configs/evaluate.py:tiny --config.init_from=workdirs/grpo-tiny
    python run.py --config=configs/evaluate.py:tiny-steps --config.init_from=workdirs/evolve-tiny
    python run.py --config=configs/evaluate.py:math7b-steps --config.init_from=RUN --config.judge=RUN \
        --config.eval.method=mcts --config.eval.problems="('math500', 'aime2024', 'amc23')"

Problem sources: a JSON, JSONL or Parquet file, hf:NAME, tfds:NAME, gs://…, tiny:test, or a benchmark's name (math500,
math, aime2024, amc23, olympiadbench, college_math, gsm8k, gaokao2023en, math_vision). Several runs side by side:
--config.compare="('workdirs/a', 'workdirs/b')".

RUN may be a self-evolution: its last finished round is taken.

MODE-steps is for policies that write code steps: their programs run in the sandbox. The published protocol is 64
searches of 12 rollouts x 32 candidates, of whose answers the 4 of highest PPM score vote; 16 candidates x 8 rollouts is
said to be nearly as good. A search that may end early: --config.search.choose=votes --config.search.stop=decided.
"""

from configs import common, search
from smallmath_jax.search.settings import TEST_SEARCHES, TEST_TOP_K, preset

STEPS = "-steps"


def get_config(mode=None):
    mode = mode or ""
    steps = mode.endswith(STEPS)
    names = (*common.MODELS, *(name + STEPS for name in common.MODELS))
    mode = common.check_mode(mode, names).removesuffix(STEPS)
    tiny = mode == "tiny"
    config = common.base("evaluate", mode)
    config.prompt.grammar = "auto"  # that of the run in init_from, else think_answer
    config.eval = common.evaluation(mode)
    # sample: whole answers | with steps also: chains: step by step | mcts: tree searches | beam: step beam searches
    config.eval.method = "sample"
    config.eval.searches = 4 if tiny else TEST_SEARCHES  # complete searches (or chains) a problem
    config.eval.top_k = TEST_TOP_K  # of their answers, by PPM score, that vote
    config.eval.beam_width = 4  # steps that go on, with method beam
    config.judge = ""  # workdir of configs/ppm.py or configs/evolve.py: its preference model
    config.search = search.settings_of(preset("test"))
    config.in_flight = 0  # problems searched at a time; 0: as many as keep the slots full
    config.sandbox = search.sandbox()
    config.sampling = common.sampling(16 if tiny else 2048)  # of one step
    config.compare = ()  # workdirs of other evaluations, shown side by side in the report
    if tiny:
        config.search.update({"rollouts": 8, "candidates": 8, "max_depth": 12})
        config.sandbox.modules = ()
    if steps:
        search.code_steps(config, mode)
        config.eval.problems = ("tiny:test",) if tiny else config.eval.problems
        config.eval.sampling.max_tokens = 80 if tiny else 2048
    return config
