"""The programs a config runs, as abstract functions: what `parallel.compile` compiles for a machine that is absent.

Training runs on all chips; the engine runs on one host's, with its own bf16 weights. Each program is listed
with what else lies in a chip's memory while it runs, so that "fits" means the whole run. The fp32 weights lie there
once: a stage's first state takes the buffers of the loaded model. Only GRPO with kl_beta > 0 keeps a second set, the
reference's.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from smallmath_jax.models import folders, weights
from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.qwen_vl import abstract_model
from smallmath_jax.parallel import rules, topologies
from smallmath_jax.parallel.compile import Program, abstract, gib_per_chip
from smallmath_jax.parallel.mesh import make_mesh
from smallmath_jax.parallel.published import PUBLISHED
from smallmath_jax.parallel.topologies import Topology
from smallmath_jax.rollout import programs as engine
from smallmath_jax.tasks.policy import compute_dtype, trainable
from smallmath_jax.tasks.training import fit_rows, make_compute, microbatches_for
from smallmath_jax.train.optim import make_optimizer
from smallmath_jax.train.programs import abstract_state, train_step_program

FILL = 32  # pages the engine copies to slots in one call
_DONATED = {"prefill": (1,), "fill_slots": (0,), "decode": (1,)}  # as the engine's own jit does
SHORTEST_STEP = 16  # tokens: so many places of a row can be judged
FIRST_UNUSED = 151665  # Qwen: vocabulary rows from here on are no token


def programs(config: Any, mesh: Mesh, machine: Topology) -> list[Program]:
    """All programs of an sft, grpo or ppm config on `mesh`, the machine's compile-only devices.

    A run of configs/ppm.py has no engine. Raises ValueError for another task, and as the parts do for sizes that do
    not fit together.
    """
    if config.task not in ("sft", "grpo", "ppm"):
        raise ValueError(
            f"task {config.task!r} has no train step of its own; compile configs/sft.py, configs/grpo.py or "
            "configs/ppm.py"
        )
    model = model_config(config)
    if config.task == "ppm":
        return [_judge_program(config, model, mesh)]
    host = topologies.devices(topologies.host_of(machine.name))
    local = make_mesh(-1, 1, math.gcd(config.engine.tensor_parallel, len(host)), host)
    sampling = _engine_programs(config, model, local)
    reference = _reference(config, model, mesh)
    listed = []
    if config.task == "sft" or config.cold_start:
        listed.append(_train_program(config, config.sft, "sft", model, mesh, {}))
    if config.task == "grpo":
        held = {"engine (bf16 weights, slots, pages)": sampling.held} | reference
        listed.append(_train_program(config, config.grpo, "grpo", model, mesh, held))
    optimizer, _ = make_optimizer(getattr(config, config.task).optimizer, 1000)
    state = gib_per_chip(abstract_state(model, mesh, optimizer, trainable(config)))
    for program in sampling.programs:
        resident = {**program.resident, "train state (fp32 weights, AdamW)": state} | reference
        listed.append(dataclasses.replace(program, resident=resident))
    return listed


def model_config(config: Any) -> ModelConfig:
    """The model's shape: of a local folder, else of the published model, which needs no download."""
    if config.model in PUBLISHED:
        return PUBLISHED[config.model]
    return weights.read_config(folders.locate(config.model))


def _reference(config: Any, model: ModelConfig, mesh: Mesh) -> dict[str, float]:
    """The second set of weights that a KL term needs beside the train state."""
    if config.task != "grpo" or not config.grpo.kl_beta:
        return {}
    weights = abstract_model(model)
    placed = abstract(weights, rules.shardings(weights, mesh))
    return {"reference policy (fp32 weights)": gib_per_chip(placed)}


def _train_program(
    config: Any, settings: Any, loss: str, model: ModelConfig, mesh: Mesh, held: dict[str, float]
) -> Program:
    """The train step at the config's full batch."""
    settings = fit_rows(settings, mesh)
    rows = settings.microbatch_rows
    if loss == "sft":
        microbatches, loss_settings = -(-settings.rows // rows), {}
    else:
        longest = config.prompt.max_tokens + settings.sampling.max_tokens
        sequences = settings.prompts * settings.group_size // settings.updates
        patches = config.vision.max_patches if model.vision is not None else 0
        microbatches = microbatches_for(sequences, longest, patches, settings)
        loss_settings = {
            "epsilon_low": settings.epsilon_low,
            "epsilon_high": settings.epsilon_high,
            "importance_cap": settings.importance_cap,
        }
    banned = range(min(FIRST_UNUSED, model.text.vocab_size), model.text.vocab_size)
    compute = make_compute(model, config, mesh, banned if loss == "grpo" else ())
    compute = dataclasses.replace(compute, head_chunk=compute.head_chunk or rules.head_chunk(mesh))
    return train_step_program(
        model,
        mesh,
        loss=loss,
        optimizer_settings=settings.optimizer,
        compute=compute,
        microbatches=microbatches,
        rows=rows,
        row_length=settings.row_length,
        row_patches=settings.row_patches if model.vision is not None else 0,
        trainable=trainable(config),
        loss_settings=loss_settings,
        resident=held,
    )


def _judge_program(config: Any, model: ModelConfig, mesh: Mesh) -> Program:
    """A reward model's train step at the config's full batch, were each pair to bring two paths of its own."""
    settings = fit_rows(config.ppm, mesh)
    rows, length = settings.microbatch_rows, settings.row_length
    patches = config.vision.max_patches if model.vision is not None else 0
    longest = min(settings.max_tokens, length)
    ends = rows * length // SHORTEST_STEP
    compute = make_compute(model, config, mesh)
    return train_step_program(
        model,
        mesh,
        loss=settings.loss,
        optimizer_settings=settings.optimizer,
        compute=dataclasses.replace(compute, head_chunk=rules.head_chunk(mesh)),
        microbatches=microbatches_for(2 * settings.pairs, longest, patches, settings),
        rows=rows,
        row_length=length,
        row_patches=settings.row_patches if model.vision is not None else 0,
        trainable=trainable(config),
        loss_settings={"tanh": settings.tanh_in_loss} if settings.loss == "ppm" else {},
        value_dropout=settings.dropout,
        ends=ends,
        pairs=ends // 2,
    )


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """The engine's programs, and the GiB a chip its arrays hold between calls."""

    programs: list[Program]
    held: float


def _engine_programs(config: Any, model: ModelConfig, mesh: Mesh) -> _Sampling:
    """Copying the weights, looking at an image, prefill, filling slots and decode, on one host's chips."""
    settings = config.engine
    dtype = compute_dtype(config)
    params = abstract_model(model)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    params = abstract(params, rules.shardings(params, mesh))
    row_pages = -(-settings.cache_length // settings.prefill_chunk)
    shape = engine.Shape(
        config=model,
        slots=settings.slots,
        cache_length=row_pages * settings.prefill_chunk,
        chunk=settings.prefill_chunk,
        pages=max(row_pages, settings.pages or settings.slots * row_pages // 2),
        prefill_rows=max(1, 512 // settings.prefill_chunk),
        decode_steps=settings.decode_steps,
        dtype=dtype.name,
        mesh=mesh,
    )
    whole = lambda tree: jax.tree.map(lambda leaf: _shaped(leaf, rules.replicated(mesh)), tree)
    placed = lambda tree, axes: jax.tree.map(
        lambda leaf: _shaped(leaf, engine.sharding(shape, leaf.shape, axes)), tree
    )
    banned = whole(np.zeros(model.text.vocab_size, bool))
    eos = whole(np.zeros(max(len(model.eos_ids), 1), np.int32))
    ready = jax.eval_shape(functools.partial(engine.prepare, shape), params, banned, eos)
    ready = abstract(ready.unpack(), engine.weight_shardings(mesh, ready.unpack()))
    ready = engine.Packed(*_flat(ready))
    slots, pages = jax.eval_shape(functools.partial(engine.make_caches, shape))
    slots, pages = placed(slots, engine.SLOTS), placed(pages, engine.PAGES)
    sizes = {"weights": ready, "slots": slots, "pages": pages}
    sizes = {name: gib_per_chip(tree) for name, tree in sizes.items()}
    keep = lambda *names: {f"engine {name}": sizes[name] for name in names}
    call = lambda name, *arguments, beside=(): Program(
        f"engine {name.__name__}",
        mesh,
        functools.partial(name.__wrapped__, shape),
        arguments,
        donate=_DONATED.get(name.__name__, ()),
        resident=keep(*beside),
    )
    fill = whole(np.zeros(FILL, np.int32))
    listed = [
        call(engine.prepare, params, banned, eos),
        call(engine.prefill, ready, pages, whole(_chunks(shape)), beside=("slots",)),
        call(engine.fill_slots, slots, pages, fill, fill, fill, beside=("weights",)),
        call(
            engine.decode,
            ready,
            slots,
            whole(engine.idle_rows(shape.slots)),
            whole(np.int32(0)),
            beside=("pages",),
        ),
    ]
    if model.vision is not None:
        listed.insert(
            1, call(engine.see, ready, whole(_vision(config, model)), beside=("slots", "pages"))
        )
    return _Sampling(listed, sum(sizes.values()))


def _flat(tree: Any) -> tuple[tuple[Any, ...], Any]:
    leaves, structure = jax.tree.flatten(tree)
    return tuple(leaves), structure


def _shaped(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _vision(config: Any, model: ModelConfig) -> dict[str, np.ndarray]:
    """One row of data.images.vision_row."""
    patches, vision = config.vision.max_patches, model.vision
    whole = np.zeros(patches, np.int32)
    return {
        "pixels": np.zeros((patches, vision.patch_values), np.float32),
        "rotary": np.zeros((patches, 2), np.int32),
        "frame_segments": whole,
        "window_segments": whole,
        "restore": np.zeros(patches // vision.merge**2, np.int32),
    }


def _chunks(shape: engine.Shape) -> engine.Chunks:
    rows, chunk = shape.prefill_rows, shape.chunk
    seen = (rows, chunk, shape.config.text.hidden_size)
    return engine.Chunks(
        tokens=np.zeros((rows, chunk), np.int32),
        positions=np.zeros((rows, 3, chunk), np.int32),
        start=np.zeros(rows, np.int32),
        before=np.zeros((rows, shape.row_pages), np.int32),
        target=np.zeros(rows, np.int32),
        last=np.zeros(rows, np.int32),
        seen=jax.ShapeDtypeStruct(seen, jnp.dtype(shape.dtype)),
        is_seen=np.zeros((rows, chunk), bool),
    )
