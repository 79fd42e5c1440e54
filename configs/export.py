"""Export a run's newest (or chosen) checkpoint as a Hugging Face folder.

    python run.py --config=configs/export.py --config.init_from=workdirs/grpo-tiny --config.out=exported

The folder has the hub's tensor names and flat config, and loads in transformers, vLLM and back into this project.
"""

from configs import common


def get_config(mode=None):
    mode = common.check_mode(mode)
    config = common.base("export", mode)
    config.prompt.grammar = "auto"  # that of the run in init_from, else think_answer
    config.step = -1  # -1: the newest checkpoint
    config.out = ""  # default: WORKDIR/export
    config.dtype = "auto"  # auto: as the source folder says; or float32, bfloat16, float16
    config.max_shard_bytes = 5_000_000_000
    return config
