"""A checkpoint as a Hugging Face folder: to serve it anywhere, or to start again from it."""

from typing import Any

import jax.numpy as jnp
from etils import epath

from smallmath_jax.models import lora, weights
from smallmath_jax.parallel import hosts
from smallmath_jax.tasks import runs
from smallmath_jax.tasks.policy import Policy, load_policy, make_mesh, restore_run


def run(config: Any, workdir: str) -> None:
    """Exports the model that `init_from` (a run's workdir) and `step` name."""
    if not config.init_from:
        raise ValueError("say which run to export: --config.init_from=WORKDIR")
    with runs.open_run(config, workdir):
        mesh = make_mesh(config)
        policy = load_policy(config, mesh)
        if config.step >= 0:
            model = restore_run(config.init_from, policy.model, mesh, config.step)
            policy = Policy(policy.config, policy.tokens, policy.images, model, policy.source)
        out = epath.Path(config.out or epath.Path(workdir) / "export")
        export_policy(policy, out, config.dtype, config.max_shard_bytes)


def export_policy(
    policy: Policy, out: epath.Path, dtype: str = "auto", max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes the folder: hub tensor names, flat config, tokenizer, generation config; LoRA merged."""
    weights.export_folder(
        lora.merge_lora(policy.model),
        policy.config,
        out,
        source=policy.source if policy.source else policy.tokens.tokenizer,
        tokenizer=policy.tokens.tokenizer if policy.tokens.step_ids else None,
        dtype=None if dtype == "auto" else jnp.dtype(dtype),
        max_shard_bytes=max_shard_bytes,
    )
    hosts.barrier("export")
    runs.say(f"exported to {out}")
