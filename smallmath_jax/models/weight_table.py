"""Published tensors and our leaves: one row per weight kind, which drives import, export, names and checks.

"Hub" names are those of the published files, which every transformers version and vLLM read; transformers 4.52 and
later use others in memory, which are read as well.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping

from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.qwen_vl import abstract_model
from smallmath_jax.models.tree import named_leaves


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of published tensor. Several leaves in `ours` lie fused along the file's first axis, in that order."""

    hub: str  # published name; {} is the layer
    ours: tuple[str, ...]  # our leaves, stacked over layers where the name has {}
    kind: str  # same | matrix: [out, in] in the file, [in, out] here | conv: [out, C, T, H, W], [C * T * H * W, out]


_LAYER, _OURS = "model.layers.{}", "text/layers"
TEXT = (
    Row("model.embed_tokens.weight", ("text/embed",), "same"),
    Row(f"{_LAYER}.input_layernorm.weight", (f"{_OURS}/input_norm",), "same"),
    Row(f"{_LAYER}.self_attn.o_proj.weight", (f"{_OURS}/o/kernel",), "matrix"),
    Row(f"{_LAYER}.post_attention_layernorm.weight", (f"{_OURS}/post_norm",), "same"),
    Row(f"{_LAYER}.mlp.down_proj.weight", (f"{_OURS}/down/kernel",), "matrix"),
)
SPLIT = (
    Row(f"{_LAYER}.self_attn.q_proj.weight", (f"{_OURS}/q/kernel",), "matrix"),
    Row(f"{_LAYER}.self_attn.q_proj.bias", (f"{_OURS}/q/bias",), "same"),
    Row(f"{_LAYER}.self_attn.k_proj.weight", (f"{_OURS}/k/kernel",), "matrix"),
    Row(f"{_LAYER}.self_attn.k_proj.bias", (f"{_OURS}/k/bias",), "same"),
    Row(f"{_LAYER}.self_attn.v_proj.weight", (f"{_OURS}/v/kernel",), "matrix"),
    Row(f"{_LAYER}.self_attn.v_proj.bias", (f"{_OURS}/v/bias",), "same"),
    Row(f"{_LAYER}.mlp.gate_proj.weight", (f"{_OURS}/gate/kernel",), "matrix"),
    Row(f"{_LAYER}.mlp.up_proj.weight", (f"{_OURS}/up/kernel",), "matrix"),
)
FUSED = (
    Row(
        f"{_LAYER}.self_attn.qkv_proj.weight",
        (f"{_OURS}/q/kernel", f"{_OURS}/k/kernel", f"{_OURS}/v/kernel"),
        "matrix",
    ),
    Row(
        f"{_LAYER}.mlp.gate_up_proj.weight",
        (f"{_OURS}/gate/kernel", f"{_OURS}/up/kernel"),
        "matrix",
    ),
)
HEAD = (
    Row("model.norm.weight", ("text/norm",), "same"),
    Row("lm_head.weight", ("text/lm_head",), "same"),  # absent where tied
)
_BLOCK, _OURS = "visual.blocks.{}", "vision/blocks"
VISION = (
    Row("visual.patch_embed.proj.weight", ("vision/patch_embed",), "conv"),
    Row(f"{_BLOCK}.norm1.weight", (f"{_OURS}/norm1",), "same"),
    Row(f"{_BLOCK}.norm2.weight", (f"{_OURS}/norm2",), "same"),
    *(
        Row(f"{_BLOCK}.{hub}.{end}", tuple(f"{_OURS}/{name}/{leaf}" for name in ours), kind)
        for hub, ours in (
            ("attn.qkv", ("q", "k", "v")),
            ("attn.proj", ("proj",)),
            ("mlp.gate_proj", ("gate",)),
            ("mlp.up_proj", ("up",)),
            ("mlp.down_proj", ("down",)),
        )
        for end, leaf, kind in (("weight", "kernel", "matrix"), ("bias", "bias", "same"))
    ),
    Row("visual.merger.ln_q.weight", ("vision/merger/ln_q",), "same"),
    Row("visual.merger.mlp.0.weight", ("vision/merger/fc1/kernel",), "matrix"),
    Row("visual.merger.mlp.0.bias", ("vision/merger/fc1/bias",), "same"),
    Row("visual.merger.mlp.2.weight", ("vision/merger/fc2/kernel",), "matrix"),
    Row("visual.merger.mlp.2.bias", ("vision/merger/fc2/bias",), "same"),
)
TABLES: dict[str, tuple[Row, ...]] = {
    "qwen2_5_vl": (*TEXT, *SPLIT, *HEAD, *VISION),
    "qwen2": (*TEXT, *SPLIT, *HEAD),
    "phi3": (*TEXT, *FUSED, *HEAD),
}
# In a file of its own, under names of our own: Hugging Face has no class for it.
VALUE_HEAD = (
    Row("value_head.weight", ("value_head/kernel",), "matrix"),
    Row("value_head.bias", ("value_head/bias",), "same"),
)
# Names of transformers >= 4.52 in memory -> published names.
_RENAMES = (("model.visual.", "visual."), ("model.language_model.", "model."))
RECOMPUTED = re.compile(r"\.(inv_freq|masked_bias)$")  # buffers some old files carry


@dataclasses.dataclass(frozen=True)
class Published:
    """One published tensor: its row, its layer (None: not stacked), its shape in the file."""

    row: Row
    layer: int | None
    shape: tuple[int, ...]


def hub_tensors(config: ModelConfig) -> dict[str, Published]:
    """Every tensor of the published file of a model, by published name, in file order."""
    shapes = {name: leaf.shape for name, leaf in named_leaves(abstract_model(config))}
    return published(TABLES[config.family], config, shapes)


def published(
    rows: tuple[Row, ...], config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Published]:
    """The table laid out for one model: rows whose leaves it lacks (tied head, no bias) drop out."""
    rows = tuple(row for row in rows if row.ours[0] in shapes)
    result = {}
    for _, group in itertools.groupby(rows, key=lambda row: row.hub.partition("{}")[0]):
        group = tuple(group)
        stacked = "{}" in group[0].hub
        layers = range(shapes[group[0].ours[0]][0]) if stacked else (None,)
        for layer, row in itertools.product(layers, group):
            result[row.hub.format(layer)] = Published(row, layer, _file_shape(row, config, shapes))
    return result


def _file_shape(
    row: Row, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    ours = [shapes[name][1:] if "{}" in row.hub else shapes[name] for name in row.ours]
    if row.kind == "conv":
        vision = config.vision
        return (ours[0][1], vision.in_channels, vision.temporal_patch, vision.patch, vision.patch)
    if row.kind == "matrix":
        return (sum(shape[1] for shape in ours), ours[0][0])
    return (sum(shape[0] for shape in ours), *ours[0][1:])


def hub_name(name: str) -> str:
    """The published name of a tensor that is stored under that or under transformers' name in memory."""
    for new, hub in _RENAMES:
        if name.startswith(new):
            return hub + name.removeprefix(new)
    return name
