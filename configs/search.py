"""Monte Carlo tree search over code steps (rStar-Math, section 3.2): a tree a problem, with a page for each.

    python run.py --config=configs/search.py:tiny --config.init_from=workdirs/evolve-tiny/bootstrap
    python run.py --config=configs/search.py:math7b --config.problems="('convert:math_train',)" \
        --config.judge=workdirs/ppm --config.search.guidance=ppm

Without --config.judge the search is guided by outcomes alone. Problems with pictures are searched like any other by a
vision model. These trees are to be learnt from: answers are graded on the way, and problems that share text with a
benchmark are left out. To search benchmarks at test time: configs/evaluate.py.
"""

import dataclasses

from ml_collections import ConfigDict, config_dict

from configs import common
from smallmath_jax.search.settings import SearchSettings, preset


def settings_of(settings: SearchSettings) -> ConfigDict:
    """The fields of config.search; seed and round come from elsewhere."""
    fields = dataclasses.asdict(settings)
    for name in ("seed", "round"):
        del fields[name]
    fields["dead_end"] = config_dict.placeholder(float)  # None: nothing is backed up
    return ConfigDict(fields)


def code_steps(config: ConfigDict, mode: str) -> None:
    """Changes a config of `common.base` to trajectories of code steps."""
    tiny = mode == "tiny"
    config.prompt.grammar = "code_steps"
    config.sampling = common.sampling(16 if tiny else 2048)  # tokens of one step
    if tiny:
        config.prompt.max_tokens = 48
        config.engine.prefill_chunk = 16
        config.engine.decode_steps = 4
    else:
        config.engine.cache_length = 4096
        config.engine.prefill_chunk = 128
        config.engine.pages = 1024


def sandbox() -> ConfigDict:
    """How model-written programs run; fields of verify.sandbox.SandboxSettings."""
    return ConfigDict(
        {
            "workers": 0,  # programs at a time; 0: one for each core
            "cpu_seconds": 5.0,
            "wall_seconds": 30.0,
            "memory_mb": 1024,
            "modules": ("sympy", "numpy", "scipy", "mpmath"),  # imported before the first program
            "allow_unsafe": False,  # run programs even where the machine allows no isolation
        }
    )


def get_config(mode=None):
    mode = common.check_mode(mode, default="math7b")
    tiny = mode == "tiny"
    config = common.base("search", mode)
    code_steps(config, mode)
    config.problems = ("tiny:train",) if tiny else ("convert:math_train",)
    config.limit = 100 if tiny else 0  # problems a source; 0: all
    config.judge = ""  # workdir of configs/ppm.py or configs/evolve.py: its preference model
    config.search = settings_of(preset("round2"))
    config.searches = 1  # of each problem, with as many seeds
    config.in_flight = 0  # problems searched at a time; 0: as many as keep the slots full
    config.sandbox = sandbox()
    return config
