"""Small-Math-R1 end to end: SFT cold start, Adjusted GRPO, evaluation before and after, report, export.

    python run.py --config=configs/grpo.py:tiny                       # minutes on two CPU cores, nothing to download
    python run.py --config=configs/grpo.py --workdir=gs://BUCKET/run  # Qwen2.5-VL-3B, on every host of a TPU pod

`--config.cold_start=False --config.init_from=WORKDIR` starts GRPO from an SFT run instead.
Published, not reproduced here: MATH-500 10.8 % (base) -> 50.4 %. Compiled memory of the 3B steps: docs/tpu.md.
"""

from ml_collections import ConfigDict

from configs import common, sft


def get_config(mode=None):
    mode = common.check_mode(mode)
    tiny = mode == "tiny"
    vision = mode in ("tiny", "3b", "7b")
    config = common.base("grpo", mode)
    config.cold_start = True
    config.sft = sft.sft_settings(mode)

    config.grpo = grpo = ConfigDict()
    if tiny:
        grpo.data = ("tiny:train",)
        grpo.problems = 2000
    else:
        text = ("convert:math_train",)
        grpo.data = text + ("convert:geometry3k",) if vision else text
        grpo.problems = 0  # 0: all
    grpo.steps = 40 if tiny else 500
    grpo.prompts = 32 if tiny else 64  # prompts a step
    grpo.group_size = 8
    grpo.sampling = common.sampling(56 if tiny else 2048)
    grpo.updates = 4 if tiny else 1  # optimiser updates a rollout batch, each on its own groups
    grpo.inner_epochs = 1  # mu: passes over a rollout batch
    grpo.denominator = "group"  # group (Adjusted GRPO) | printed | sequence | batch | constant
    grpo.epsilon_low = 0.2
    grpo.epsilon_high = 0.2
    grpo.advantage_scale = "group_std"  # group_std | none
    grpo.advantage_eps = 1e-4
    grpo.kl_beta = 0.0  # 0: no reference weights in memory
    grpo.importance_cap = (
        0.0  # 0: off; 2.0: truncated importance weights from the sampler's log-probs
    )
    grpo.row_length = 128 if tiny else 3072
    grpo.row_patches = 32 if tiny else 4096
    grpo.microbatch_rows = 16 if tiny else 8  # at least; a multiple of the chips they are cut over
    grpo.optimizer = common.optimizer(
        1e-4 if tiny else 1e-6, schedule="constant", warmup_steps=5 if tiny else 10
    )
    grpo.eval_every = 0 if tiny else 50  # steps between evaluations while training; 0: none

    config.reward = common.reward()
    if tiny:
        config.reward.target_length = 32
    config.eval = common.evaluation(mode)
    config.eval.before = True
    config.eval.after = True
    # Also evaluate with this text forced after the prompt; tiny: the worked style, before and after.
    config.eval.forced_prefix = "<think>Steps:\n" if tiny else ""
    config.checkpoint.every = 20 if tiny else 25
    config.export = True
    return config
