"""What a model is, read from and written to Hugging Face's config.json.

Every number comes from the file: the class defaults of transformers are not the published values (vision hidden
size, tokens per second and RMS epsilon all differ), so a missing key is an error here, never a default.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

_FAMILIES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. `mrope_section` counts the frequencies of t, h and w; None is plain rotary embedding."""

    vocab_size: int  # rows of the embedding, more than the tokenizer has
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rope_theta: float
    rms_eps: float
    tie: bool  # the head is the embedding
    qkv_bias: bool
    mrope_section: tuple[int, int, int] | None = None
    sliding_window: int | None = None  # a token sees this many tokens, itself included
    max_positions: int = 32768


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. `window` is in pixels; head_dim is hidden // heads."""

    depth: int
    hidden: int
    heads: int
    intermediate: int
    out_hidden: int
    window: int
    full_attention_blocks: tuple[int, ...]
    tokens_per_second: float = 2
    in_channels: int = 3
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch, (channel, time, row, column)."""
        return self.in_channels * self.temporal_patch * self.patch**2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model: hashable, so it can be a static argument of a compiled function."""

    family: str  # qwen2_5_vl | qwen2 | phi3
    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # any of them ends a completion; the first is config.json's
    bos_id: int | None = None
    pad_id: int | None = None


def from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Reads config.json, flat (transformers 4, the hub) or nested (transformers 5 writes `text_config`).

    `generation` is generation_config.json: its EOS ids join those of the config. Raises ValueError for a family,
    rotary scaling or sliding-window layout this decoder does not compute, and for a missing key.
    """
    family = _family(config)
    flat = {**config, **(config.get("text_config") or {})}
    # transformers keeps the tie at the top level and leaves a stale copy in text_config
    flat["tie_word_embeddings"] = config.get(
        "tie_word_embeddings", _need(flat, "tie_word_embeddings")
    )
    eos = [*_ids(flat.get("eos_token_id")), *_ids((generation or {}).get("eos_token_id"))]
    special = {}
    if family == "qwen2_5_vl":
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        special = {name: int(_need(flat, name)) for name in names}
    pad = flat.get("pad_token_id", (generation or {}).get("pad_token_id"))
    return ModelConfig(
        family=family,
        text=_text(flat, family),
        vision=_vision(_need(flat, "vision_config")) if family == "qwen2_5_vl" else None,
        eos_ids=tuple(dict.fromkeys(eos)),
        bos_id=flat.get("bos_token_id"),
        pad_id=pad,
        **special,
    )


def to_hf(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """Writes the flat config.json of transformers 4.41, which every later version and vLLM read alike."""
    text = config.text
    result = {
        "architectures": [_FAMILIES[config.family]],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if config.eos_ids else None,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate,
        "max_position_embeddings": text.max_positions,
        "model_type": config.family,
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "num_key_value_heads": text.kv_heads,
        "rms_norm_eps": text.rms_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie,
        "torch_dtype": dtype,
        "transformers_version": "4.41.2",
        "use_cache": True,
        "vocab_size": text.vocab_size,
    }
    if config.pad_id is not None:
        result["pad_token_id"] = config.pad_id
    if text.head_dim * text.heads != text.hidden_size:
        result["head_dim"] = text.head_dim
    if config.family == "phi3":
        result |= {
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "original_max_position_embeddings": text.max_positions,
            "rope_scaling": None,
            "sliding_window": text.sliding_window,
        }
    else:
        result |= {
            "max_window_layers": text.layers,
            "sliding_window": text.max_positions,
            "use_sliding_window": False,
        }
    if config.vision is not None:
        result |= _vision_to_hf(config)
    return dict(sorted(result.items()))


def tiny_config(
    vocab_size: int,
    *,
    image_token_id: int,
    video_token_id: int,
    vision_start_token_id: int,
    vision_end_token_id: int,
    eos_ids: tuple[int, ...],
    bos_id: int | None = None,
    pad_id: int | None = None,
    hidden_size: int = 128,
    layers: int = 2,
) -> ModelConfig:
    """A Qwen2.5-VL of well under a million parameters that learns on a laptop; width and depth can be raised."""
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        heads=4,
        kv_heads=2,
        head_dim=hidden_size // 4,
        intermediate=2 * hidden_size,
        rope_theta=10000.0,
        rms_eps=1e-6,
        tie=True,
        qkv_bias=True,
        mrope_section=_tiny_sections(hidden_size // 8),
        max_positions=4096,
    )
    vision = VisionConfig(
        depth=2,
        hidden=64,
        heads=2,
        intermediate=128,
        out_hidden=hidden_size,
        window=112,
        full_attention_blocks=(1,),
    )
    return ModelConfig(
        family="qwen2_5_vl",
        text=text,
        vision=vision,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        vision_start_token_id=vision_start_token_id,
        vision_end_token_id=vision_end_token_id,
        eos_ids=eos_ids,
        bos_id=bos_id,
        pad_id=pad_id,
    )


def _tiny_sections(half: int) -> tuple[int, int, int]:
    # the published proportions 16 : 24 : 24
    return (half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8)


def _family(config: Mapping[str, Any]) -> str:
    family = config.get("model_type", "")
    if family not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"config.json: model_type {family!r} is not supported; known: {known}")
    return family


def _need(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(
            f"config.json: {key!r} is missing; copy it from the published config (class defaults differ from it)"
        )
    return config[key]


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [int(one) for one in value] if isinstance(value, list | tuple) else [int(value)]


def _text(flat: Mapping[str, Any], family: str) -> TextConfig:
    rope = flat.get("rope_parameters") or flat.get("rope_scaling") or {}
    kind = rope.get("type", rope.get("rope_type", "default"))
    if kind not in ("default", "mrope") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: rotary scaling {rope!r} is not supported")
    if flat.get("use_sliding_window"):
        raise ValueError(
            "config.json: use_sliding_window=true (windows on some layers) is not supported"
        )
    if flat.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"config.json: hidden_act {flat['hidden_act']!r} is not supported, only 'silu'"
        )
    heads = int(_need(flat, "num_attention_heads"))
    hidden = int(_need(flat, "hidden_size"))
    sections = rope.get("mrope_section") if family == "qwen2_5_vl" else None
    if family == "qwen2_5_vl" and sections is None:
        raise ValueError("config.json: rope_scaling.mrope_section is missing")
    return TextConfig(
        vocab_size=int(_need(flat, "vocab_size")),
        hidden_size=hidden,
        layers=int(_need(flat, "num_hidden_layers")),
        heads=heads,
        kv_heads=int(_need(flat, "num_key_value_heads")),
        head_dim=int(flat.get("head_dim") or hidden // heads),
        intermediate=int(_need(flat, "intermediate_size")),
        rope_theta=float(rope.get("rope_theta") or _need(flat, "rope_theta")),
        rms_eps=float(_need(flat, "rms_norm_eps")),
        tie=bool(flat["tie_word_embeddings"]),
        qkv_bias=family != "phi3",
        mrope_section=tuple(sections) if sections else None,
        sliding_window=flat.get("sliding_window") if family == "phi3" else None,
        max_positions=int(_need(flat, "max_position_embeddings")),
    )


def _vision(vision: Mapping[str, Any]) -> VisionConfig:
    channels = vision.get("in_chans", vision.get("in_channels"))
    if channels is None:
        raise ValueError("config.json: vision_config.in_chans is missing")
    return VisionConfig(
        depth=int(_need(vision, "depth")),
        hidden=int(_need(vision, "hidden_size")),
        heads=int(_need(vision, "num_heads")),
        intermediate=int(_need(vision, "intermediate_size")),
        out_hidden=int(_need(vision, "out_hidden_size")),
        window=int(_need(vision, "window_size")),
        full_attention_blocks=tuple(_need(vision, "fullatt_block_indexes")),
        tokens_per_second=_need(vision, "tokens_per_second"),
        in_channels=int(channels),
        patch=int(_need(vision, "patch_size")),
        temporal_patch=int(_need(vision, "temporal_patch_size")),
        merge=int(_need(vision, "spatial_merge_size")),
    )


def _vision_to_hf(config: ModelConfig) -> dict[str, Any]:
    vision = config.vision
    return {
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.text.mrope_section)},
        "vision_config": {
            "depth": vision.depth,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
            "hidden_act": "silu",
            "hidden_size": vision.hidden,
            "in_chans": vision.in_channels,
            "intermediate_size": vision.intermediate,
            "model_type": "qwen2_5_vl",
            "num_heads": vision.heads,
            "out_hidden_size": vision.out_hidden,
            "patch_size": vision.patch,
            "spatial_merge_size": vision.merge,
            "spatial_patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch,
            "tokens_per_second": vision.tokens_per_second,
            "window_size": vision.window,
        },
    }
