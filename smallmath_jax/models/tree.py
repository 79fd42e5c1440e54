"""Slash names of parameters: `text/layers/q/kernel`. Sharding rules, weight tables and LoRA patterns use them."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def leaf_name(path: tuple[Any, ...]) -> str:
    """The slash name of a key path of jax.tree_util; Flax's own last step (`value` of a Param) is left out."""
    parts = [_part(key) for key in path]
    if parts and parts[-1] == "value" and isinstance(path[-1], GetAttrKey):
        parts.pop()
    return "/".join(parts)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(name, leaf) of every leaf of a module, an optimizer state or an abstract model, in tree order."""
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """The same tree with each leaf replaced by function(name, leaf)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf_name(path), leaf), tree
    )


def bits_digest(tree: Any) -> str:
    """32 hex digits that name the exact numbers of a tree's leaves, the same however devices share them."""
    sums = [np.asarray(_sum_of_bits(leaf)) for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(np.asarray(sums, np.uint32).tobytes()).hexdigest()[:32]


@jax.jit
def _sum_of_bits(leaf: jax.Array) -> jax.Array:
    """The bits of all numbers as whole ones, added modulo 2**32: the order of the sum does not matter."""
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = (
        leaf
        if leaf.dtype == jnp.bool_
        else lax.bitcast_convert_type(leaf, kinds[leaf.dtype.itemsize])
    )
    return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)


def parameter_count(tree: Any) -> int:
    """How many numbers a model holds; works on an abstract model of jax.eval_shape too."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _part(key: Any) -> str:
    if isinstance(key, GetAttrKey):
        return key.name
    if isinstance(key, DictKey | FlattenedIndexKey):
        return str(key.key)
    return str(key.idx) if isinstance(key, SequenceKey) else str(key)
