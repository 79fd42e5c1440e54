"""Solve one problem and print the reasoning and the answer.

    python run.py --config=configs/solve.py --config.model=FOLDER --config.problem="What is 3 * 7?"
    python run.py --config=configs/solve.py:tiny --config.init_from=workdirs/grpo-tiny --config.problem="…" \
        --config.image=FILE
"""

from configs import common


def get_config(mode=None):
    mode = common.check_mode(mode)
    config = common.base("solve", mode)
    config.problem = ""
    config.image = ""  # a picture's file
    config.sampling = common.sampling(64 if mode == "tiny" else 2048, temperature=0.0)
    config.engine.slots = 1
    return config
