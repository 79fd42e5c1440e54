"""Solve one problem and print the reasoning and the answer.

    python run.py --config=configs/solve.py --config.model=FOLDER --config.problem="What is 3 * 7?"
    python run.py --config=configs/solve.py:tiny --config.init_from=workdirs/grpo-tiny --config.problem="…" \
        --config.image=FILE

By tree search, with a policy that writes code steps; guided by a preference model where --config.judge names one:

    python run.py --config=configs/solve.py:tiny --config.method=mcts --config.init_from=workdirs/evolve-tiny \
        --config.judge=workdirs/evolve-tiny --config.problem="Solve 5x=10."

The tree is shown by a page in WORKDIR/report/trees. Of a self-evolution the last finished round is taken.
"""

from configs import common, search
from smallmath_jax.search.settings import preset


def get_config(mode=None):
    mode = common.check_mode(mode)
    tiny = mode == "tiny"
    config = common.base("solve", mode)
    config.prompt.grammar = (
        "auto"  # that of the run in init_from, else think_answer; mcts: code_steps
    )
    config.problem = ""
    config.image = ""  # a picture's file
    config.method = "sample"  # sample: one answer | mcts: a tree search over code steps
    config.sampling = common.sampling(64 if tiny else 2048, temperature=0.0)
    config.engine.slots = 1  # mcts: one for each candidate

    config.judge = ""  # mcts: workdir of configs/ppm.py or configs/evolve.py, its preference model
    config.step_sampling = common.sampling(16 if tiny else 2048)  # mcts: tokens of one step
    config.search = search.settings_of(preset("test"))
    # There is no gold answer, the judge guides where there is one, and its odds weigh the vote on all answers
    for name in ("use_gold", "guidance", "choose"):
        del config.search[name]
    if tiny:
        config.search.update({"rollouts": 8, "candidates": 8, "max_depth": 12})
        config.search.update({"exploration": 0.5, "prior": 2.0})  # as in configs/evolve.py:tiny
    config.sandbox = search.sandbox()
    if tiny:
        config.sandbox.modules = ()
    return config
