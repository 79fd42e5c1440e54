"""Supervised fine-tuning into <think>…</think><answer>…</answer> (Small-Math-R1, section 3.2.1).

    python run.py --config=configs/sft.py:tiny                      # minutes on two CPU cores
    python run.py --config=configs/sft.py --workdir=gs://BUCKET/sft  # Qwen2.5-VL-3B, on every host of a TPU pod

Published, not reproduced here: the recipe's base model scores 10.8 % on MATH-500 and 50.4 % after SFT and GRPO.
Compiled memory of the 3B step: docs/tpu.md.
"""

from configs import common


def sft_settings(mode: str):
    """The fields of config.sft; configs/grpo.py uses the same for its cold start."""
    from ml_collections import ConfigDict

    tiny = mode == "tiny"
    vision = mode in ("tiny", "3b", "7b")
    settings = ConfigDict()
    if tiny:
        settings.data = ("tiny:train",)
        settings.problems = 8000
        # The cold-start mixture: worked solutions alone, then 57 % of them replaced by terse ones (the answer at once).
        settings.worked_steps = 1000
        settings.terse_share = 0.57
    else:
        text = ("convert:openr1_math",)
        settings.data = ("convert:r1_onevision",) + text if vision else text
        settings.problems = 40000  # a source, drawn by seed; 0: all
        settings.worked_steps = 0
        settings.terse_share = 0.0
    settings.steps = 1300 if tiny else 0  # 0: from epochs
    settings.epochs = 2
    settings.rows = 12 if tiny else 128  # packed rows a step
    settings.row_length = 128 if tiny else 4096
    settings.row_patches = 32 if tiny else 4096
    settings.microbatch_rows = (
        12 if tiny else 8
    )  # at least; a multiple of the chips they are cut over
    settings.optimizer = common.optimizer(
        3e-3 if tiny else 1e-5,
        name="muon" if tiny else "adamw",
        schedule="cosine",
        warmup_steps=30 if tiny else 20,
        weight_decay=0.0 if tiny else 0.1,
        b2=0.99 if tiny else 0.999,
        final_fraction=0.05 if tiny else 0.0,
    )
    return settings


def get_config(mode=None):
    mode = common.check_mode(mode)
    config = common.base("sft", mode)
    config.sft = sft_settings(mode)
    config.eval = common.evaluation(mode)
    config.eval.before = mode == "tiny"
    config.eval.after = True
    config.export = True
    return config
