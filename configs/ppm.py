"""Train a process preference model on searched trees, or its rivals (rStar-Math, sections 3.3 and 9.2).

    python run.py --config=configs/ppm.py:tiny --config.init_from=workdirs/sft --config.trees="('workdirs/s/trees',)"
    python run.py --config=configs/ppm.py:math7b --config.ppm.loss=orm --config.trees="('gs://…/trees',)"

The trees must have been searched with gold answers. configs/search.py takes the result as --config.judge=WORKDIR
with --config.search.guidance=ppm. Compiled memory of the 7B step, 11.55 GiB a chip of v5e-16: docs/tpu.md.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common, search
from smallmath_jax.search.pairs import PairSettings


def ppm_settings(mode: str) -> ConfigDict:
    """The fields of config.ppm; configs/evolve.py uses the same."""
    tiny = mode == "tiny"
    settings = ConfigDict()
    settings.loss = "ppm"  # ppm: pairs | pqm: squared error on Q-values | orm: outcomes
    settings.tanh_in_loss = False  # True: as the paper draws it; False: its public code
    settings.dropout = 0.1  # of the value head
    settings.epochs = 1
    settings.steps = 0  # 0: from epochs
    settings.tokens = 0  # stop after as many tokens, to compare at equal cost; 0: no such limit
    settings.pairs = 64 if tiny else 512  # pairs (or examples) a step
    settings.max_tokens = 128 if tiny else 2048  # a longer side drops its pair, counted
    settings.held_out = 0.05  # of the problems
    settings.eval_every = 50 if tiny else 100
    settings.row_length = 128 if tiny else 4096
    settings.row_patches = 64 if tiny else 4096
    settings.microbatch_rows = 16
    settings.optimizer = common.optimizer(
        1e-3 if tiny else 7e-6, schedule="linear", b2=0.99 if tiny else 0.999
    )
    return settings


def pair_settings(mode: str) -> ConfigDict:
    """The fields of config.pairs; steps of the embedded problems are a few characters long."""
    settings = ConfigDict(dataclasses.asdict(PairSettings()))
    if mode == "tiny":
        settings.update({"min_edit": 0, "max_tokens": 128})
    return settings


def get_config(mode=None):
    mode = common.check_mode(mode, default="math7b")
    config = common.base("ppm", mode)
    search.code_steps(config, mode)
    config.trees = ()  # folders of trees/*.jsonl
    config.pairs = pair_settings(mode)
    config.ppm = ppm_settings(mode)
    return config
