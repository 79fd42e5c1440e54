"""The shapes of published models by hub name: what is needed to compile a run before anything is downloaded.

Copied from the models' config.json on the hub; `models.config.from_hf` reads the real file when there is one, and
tests hold the parameter counts to the published ones. Qwen2.5-Math's are known second-hand (its base models' files).
"""

import dataclasses

from smallmath_jax.models.config import ModelConfig, TextConfig, VisionConfig

_TEXT_3B = TextConfig(
    vocab_size=151936,
    hidden_size=2048,
    layers=36,
    heads=16,
    kv_heads=2,
    head_dim=128,
    intermediate=11008,
    rope_theta=1e6,
    rms_eps=1e-6,
    tie=True,
    qkv_bias=True,
    mrope_section=(16, 24, 24),
    max_positions=128000,
)
_TEXT_7B = dataclasses.replace(
    _TEXT_3B,
    vocab_size=152064,
    hidden_size=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    intermediate=18944,
    tie=False,
)
_VISION = VisionConfig(
    depth=32,
    hidden=1280,
    heads=16,
    intermediate=3420,
    out_hidden=2048,
    window=112,
    full_attention_blocks=(7, 15, 23, 31),
)
_QWEN = ModelConfig(
    family="qwen2", text=_TEXT_7B, eos_ids=(151645, 151643), bos_id=151643, pad_id=151643
)
_VL_3B = dataclasses.replace(
    _QWEN,
    family="qwen2_5_vl",
    text=_TEXT_3B,
    vision=_VISION,
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
)
_MATH = {"mrope_section": None, "rope_theta": 10000.0, "max_positions": 4096}

PUBLISHED: dict[str, ModelConfig] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _VL_3B,
    "Qwen/Qwen2.5-VL-7B-Instruct": dataclasses.replace(
        _VL_3B, text=_TEXT_7B, vision=dataclasses.replace(_VISION, out_hidden=3584)
    ),
    "Qwen/Qwen2.5-Math-1.5B": dataclasses.replace(
        _QWEN,
        text=dataclasses.replace(
            _TEXT_3B, hidden_size=1536, layers=28, heads=12, intermediate=8960, **_MATH
        ),
    ),
    "Qwen/Qwen2.5-Math-7B": dataclasses.replace(_QWEN, text=dataclasses.replace(_TEXT_7B, **_MATH)),
    "microsoft/Phi-3-mini-4k-instruct": ModelConfig(
        family="phi3",
        text=TextConfig(
            vocab_size=32064,
            hidden_size=3072,
            layers=32,
            heads=32,
            kv_heads=32,
            head_dim=96,
            intermediate=8192,
            rope_theta=10000.0,
            rms_eps=1e-5,
            tie=False,
            qkv_bias=False,
            sliding_window=2047,
            max_positions=4096,
        ),
        eos_ids=(32007, 32001, 32000),
        bos_id=1,
        pad_id=32000,
    ),
}
