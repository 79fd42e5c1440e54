"""Where every parameter lives: one table from path to PartitionSpec.

Paths are the slash names of the parameter tree (`text/layers/q/kernel`), also inside an optimizer state
(`opt_state/0/mu/text/layers/q/kernel`), so that a moment always lies beside its parameter. The leading
axis of stacked leaves (layers, blocks) is never cut: the scan over layers slices it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.qwen_vl import QwenVL
from smallmath_jax.models.tree import leaf_name
from smallmath_jax.parallel.mesh import BATCH_AXES, batch_shards, platform_of

P = PartitionSpec
Rules = tuple[tuple[str, PartitionSpec], ...]

# First match wins. Two matrices of a pair (q/k/v -> o, gate/up -> down) are cut over `model` on their
# inner side, so one all-reduce a pair suffices; `fsdp` takes the other side.
RULES: Rules = (
    (r"text/(embed|lm_head)$", P("model", "fsdp")),  # [V, D]
    (r"(q|k|v|gate|up)/kernel$", P(None, "fsdp", "model")),  # [L, in, out]
    (r"(q|k|v|gate|up)/bias$", P(None, "model")),  # [L, out]
    (r"(o|proj|down)/kernel$", P(None, "model", "fsdp")),  # [L, in, out]
    (r"(o|proj|down)/bias$", P()),
    (r"(q|k|v|gate|up)/lora_a$", P(None, "fsdp", None)),  # [L, in, r]
    (r"(q|k|v|gate|up)/lora_b$", P(None, None, "model")),  # [L, r, out]
    (r"(o|proj|down)/lora_a$", P(None, "model", None)),
    (r"(o|proj|down)/lora_b$", P(None, None, "fsdp")),
    (r"vision/patch_embed$", P(None, "fsdp")),  # [C, Dv]; C = 1176 = 8 * 147 cuts badly
    (r"merger/fc1/kernel$", P("fsdp", "model")),
    (r"merger/fc1/bias$", P("model")),
    (r"merger/fc2/kernel$", P("model", "fsdp")),
    (r"merger/fc2/bias$", P()),
    (r"(input_norm|post_norm|norm1|norm2|text/norm|ln_q)$", P()),
    (r"value_head/(kernel|bias)$", P()),
    (r"ns_coeffs$", P()),  # of muon
)

_HEAD_LEAVES = (  # where `model` must cut between heads, and on which dimension of the leaf
    (r"(q|k|v)/(kernel|bias|lora_b)$", -1),
    (r"(o|proj)/(kernel|lora_a)$", -2),
)


def spec_for(
    name: str,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    rules: Rules = RULES,
    units: Mapping[str, int] | None = None,
) -> PartitionSpec:
    """The PartitionSpec of one leaf on a mesh of the given axis sizes.

    An axis that does not divide its dimension is dropped for that leaf, which is then replicated over
    it (the vision MLP's 3420 over 8, 151936 rows over 3): slower, never wrong. With `units`
    (`head_units`) a dimension made of heads is counted in heads. Scalars are replicated.

    Raises:
      ValueError: no rule matches the name, or the rule has more dimensions than the leaf.
    """
    if not shape:
        return P()
    row = next((row for row in rules if re.search(r"(^|/)" + row[0], name)), None)
    if row is None:
        raise ValueError(
            f"parallel/rules.py: no rule for parameter {name!r} of shape {shape}; "
            "add a row (path regex, PartitionSpec) to RULES"
        )
    pattern, spec = row
    if len(spec) > len(shape):
        raise ValueError(
            f"parallel/rules.py: rule {pattern!r} -> {spec} has {len(spec)} dimensions, "
            f"parameter {name!r} has shape {shape}; correct the row"
        )
    divisible = list(shape)  # what `model` must divide: heads where a dimension is made of heads
    for dimension, unit in _heads(name, units or {}):
        divisible[dimension] //= unit
    counts = {"model": divisible}
    fits = lambda i, axis: axis and counts.get(axis, shape)[i] % sizes[axis] == 0
    return P(*(axis if fits(i, axis) else None for i, axis in enumerate(spec)))


def head_units(config: ModelConfig) -> dict[str, int]:
    """Head sizes by path prefix: they keep `model` from cutting inside a head.

    Two kv heads over four shards: those leaves are replicated over `model`, as is usual.
    """
    units = {"text/": config.text.head_dim}
    if config.vision is not None:
        units["vision/"] = config.vision.hidden // config.vision.heads
    return units


def _heads(name: str, units: Mapping[str, int]) -> list[tuple[int, int]]:
    """(dimension, head size) of a leaf that has a dimension made of heads."""
    unit = next((size for prefix, size in units.items() if f"/{prefix}" in f"/{name}"), None)
    if unit is None:
        return []
    found = (dim for pattern, dim in _HEAD_LEAVES if re.search(r"(^|/)" + pattern, name))
    return [(dimension, unit) for dimension in found]


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A tree of NamedSharding beside `tree`: a model, an optimizer state or a whole TrainState.

    `tree` may hold arrays or jax.ShapeDtypeStruct; head sizes are read from the QwenVL found in it.
    Raises ValueError as `spec_for` does.
    """
    parts = jax.tree.leaves(tree, is_leaf=lambda part: isinstance(part, QwenVL))
    model = next((part for part in parts if isinstance(part, QwenVL)), None)
    units = head_units(model.config) if model is not None else {}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_for(leaf_name(path), leaf.shape, mesh.shape, rules, units))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows cut over data and fsdp; `leading` axes before the rows (microbatches) are not cut."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def constrain(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """The `constrain` slot of models.forward: activations [B, ...] cut by rows, whole otherwise.

    Keeps GSPMD from moving activations where it should gather weights. A batch that the mesh does not
    divide (one prompt at decode) is left to the compiler.
    """
    shards = batch_shards(mesh)

    def apply(x: jax.Array) -> jax.Array:
        if x.ndim == 0 or x.shape[0] % shards:
            return x
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))

    return apply


def constrain_head(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """For the head matrix [V, D] after its cast: gathered over fsdp once, before the loop over chunks.

    Left sharded, every chunk of tokens gathers it again.
    """

    def apply(head: jax.Array) -> jax.Array:
        axis = "model" if head.shape[0] % mesh.shape["model"] == 0 else None
        return jax.lax.with_sharding_constraint(head, NamedSharding(mesh, P(axis, None)))

    return apply


def head_chunk(mesh: Mesh, per_chip: int = 1024) -> int:
    """Tokens of a microbatch per pass over the vocabulary head, for the mesh's machine; 0 on CPU: the caller's choice.

    1024 a chip: the logits of one pass are 0.6 GiB; 256 a chip re-reads the head's gradient so often that the
    compiler's estimate is 70 % longer. Asks the mesh and not jax.devices(), which is the CPU under AOT compilation.
    """
    return 0 if platform_of(mesh) == "cpu" else per_chip * batch_shards(mesh)
