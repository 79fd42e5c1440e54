"""The value head of a process preference model: dropout, then one linear map of a final hidden state.

Hugging Face has no class for it, so it is exported beside the model, never inside its shards. The rStar-Math paper puts
a tanh after it, in the loss too; its code trains on the raw value and scores with tanh(raw / 5).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from smallmath_jax.models.layers import Linear, wide
from smallmath_jax.models.qwen_vl import QwenVL


def add_value_head(model: QwenVL, key: jax.Array) -> QwenVL:
    """A copy of the model with a fresh value head [D, 1] and bias [1]."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    width = model.config.text.hidden_size
    copy.value_head = Linear(width, 1, bias=True, rngs=nnx.Rngs(key))
    return copy


def last_hidden(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, T, D] and lengths int32 [B] -> [B, D]: the hidden state of each row's last token."""
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


def values(
    model: QwenVL,
    hidden: jax.Array,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    squash: float | None = None,
) -> jax.Array:
    """Value of each final hidden state [..., D]: fp32 [...]; tanh(value / squash) when `squash` is given.

    Dropout needs its key. Raises ValueError without one, or when the model has no value head.
    """
    if model.value_head is None:
        raise ValueError(
            "the model has no value head; add one with models.value_head.add_value_head"
        )
    hidden = hidden.astype(wide(hidden.dtype))
    if dropout:
        if key is None:
            raise ValueError(
                f"dropout {dropout} of the value head needs a key; give one or set it to 0"
            )
        keep = jax.random.bernoulli(key, 1 - dropout, hidden.shape)
        hidden = jnp.where(keep, hidden / (1 - dropout), 0)
    raw = model.value_head(hidden)[..., 0]
    return raw if squash is None else jnp.tanh(raw / squash)
