"""Hugging Face folder <-> parameter tree, driven by the rows of `weight_table`.

Import and export stream: the host holds a block of one leaf at a time (a layer, or some rows of the embedding), and
the device buffers are filled block by block, so a model needs no more host memory than its largest layer.
Published ("hub") names and a flat config are what every transformers version and vLLM read, so they are written;
the names transformers 4.52 and later use in memory are read as well.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from smallmath_jax.data.images import ImageSettings
from smallmath_jax.models import companions, folders, streaming, tensors
from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.qwen_vl import QwenVL, abstract_model
from smallmath_jax.models.tree import map_named, named_leaves
from smallmath_jax.models.value_head import add_value_head
from smallmath_jax.models.weight_table import (
    RECOMPUTED,
    TABLES,
    VALUE_HEAD,
    Published,
    Row,
    hub_name,
    published,
)

resolve_folder = folders.locate

_PROBLEMS_SHOWN = 20


def read_config(folder: str) -> ModelConfig:
    """The ModelConfig of a folder: config.json, and the EOS ids of generation_config.json.

    Raises FileNotFoundError where there is no config.json, ValueError for a model we do not compute.
    """
    return companions.model_config(folder)


def import_folder(
    path: str,
    *,
    shardings: Any | Callable[[QwenVL], Any] | None = None,
    dtype: Any = jnp.float32,
    device: jax.Device | None = None,
) -> tuple[QwenVL, ModelConfig]:
    """Loads a model folder (local, gs:// or hub name) onto its devices, leaf by leaf and block by block.

    Args:
      path: a folder with config.json and model.safetensors or shards with an index. `value_head.safetensors` is read
        too where it is present.
      shardings: a tree of Sharding beside the model, or a function that makes it from the abstract model (as
        `parallel.rules.shardings` does with a mesh). None: everything on `device`. On many hosts each host reads the
        parts its own devices hold.
      dtype: of every leaf.
      device: where to without shardings; default: jax's first local device.

    Returns:
      (model, config).

    Raises:
      FileNotFoundError: no such folder, no config.json, no safetensors, a shard missing.
      ValueError: a torn file; or tensors missing, extra or misshapen, all named with expected and found shape.
    """
    folder = folders.locate(path)
    config = read_config(folder)
    model = abstract_model(config)
    has_value_head = folders.VALUE_HEAD in folders.names(folder)
    if has_value_head:
        model = jax.eval_shape(add_value_head, model, jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in named_leaves(model)}
    wanted = published(TABLES[config.family], config, shapes)
    found = _match(folder, config, wanted, folders.stored_tensors(folder))
    if has_value_head:
        heads = published(VALUE_HEAD, config, shapes)
        stored = tensors.read_header(f"{folder}/{folders.VALUE_HEAD}")
        found |= _match(f"{folder}/{folders.VALUE_HEAD}", config, heads, stored)
        wanted |= heads
    sources = _sources(wanted, found, shapes)
    places = _places(model, shardings, device)
    fill = lambda name, leaf: streaming.fill(
        leaf.shape, places[name], np.dtype(dtype), sources[name]
    )
    return map_named(fill, model), config


def export_folder(
    model: QwenVL,
    config: ModelConfig,
    path: str,
    *,
    source: Any = None,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    image_settings: ImageSettings | None = None,
    overwrite: bool = True,
) -> str:
    """Writes a folder that transformers 4.49 to 5.x and vLLM load: published names, flat config, tokenizer.

    On many hosts every host calls it and the first one writes. A local folder appears whole by one rename; on an
    object store config.json is written last, and nothing without it is a model folder.

    Args:
      source: folder (or hub name) the model came from. Its config.json is kept but for changed fields, its tokenizer,
        chat template, generation and preprocessor configs are copied. Or, where there is none, a tokenizer.
      tokenizer: a transformers tokenizer, written in place of the source's (added tokens).
      dtype: of every tensor in the file. Default: that of the source's tensors, else that of the model.
      max_shard_bytes: more is split into shards with an index.
      image_settings: written as preprocessor_config.json where the source has none; default: the published ones.
      overwrite: replace the model folder that stands at `path`, so that the same command can be given again.

    Returns:
      `path`.

    Raises:
      ValueError: the model still has LoRA leaves, or does not match `config`.
      FileExistsError: `path` is `source`, or holds something that is no model folder, or anything without `overwrite`.
    """
    leaves = _exportable(model)
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    wanted = published(TABLES[config.family], config, shapes)
    if hasattr(source, "save_pretrained"):
        source, tokenizer = None, tokenizer or source
    source = None if source is None else folders.locate(source)
    path = str(path).rstrip("/")
    if source is not None and folders.same(source, path):
        raise FileExistsError(f"{path} is the folder the model came from; export to another path")
    dtype = np.dtype(dtype if dtype is not None else _default_dtype(source, leaves))
    has_value_head = "value_head/kernel" in leaves
    shards = _split(wanted, dtype.itemsize, max_shard_bytes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if (
        len(shards) == 1 and not has_value_head
    ):  # beside a value head the index tells what is the model
        files = [folders.WHOLE]
    plan = dict(zip(files, shards, strict=True))
    if has_value_head:
        plan[folders.VALUE_HEAD] = published(VALUE_HEAD, config, shapes)
    if jax.process_index() != 0:
        for entries in plan.values():  # take part in the gathers
            for _ in streaming.stream(entries, leaves):
                pass
        return path
    with folders.publish(path, overwrite) as open_file:
        for file, entries in plan.items():
            with open_file(file) as target:
                places = {name: entry.shape for name, entry in entries.items()}
                tensors.write_file(target, places, dtype, streaming.stream(entries, leaves))
        if files != [folders.WHOLE]:
            with open_file(folders.INDEX) as target:
                target.write(_index(plan, dtype.itemsize))
        companions.write(
            open_file,
            config,
            source=source,
            tokenizer=tokenizer,
            dtype=dtype.name,
            image_settings=image_settings,
        )
    return path


def _match(
    folder: str,
    config: ModelConfig,
    wanted: Mapping[str, Published],
    stored: Mapping[str, tensors.Stored],
) -> dict[str, tensors.Stored]:
    """The stored tensor of every wanted name; ValueError naming all that does not fit."""
    found = {hub_name(name): place for name, place in stored.items()}
    missing = [
        f"missing: {name}: expected {list(entry.shape)}"
        for name, entry in wanted.items()
        if name not in found
    ]
    extra = [
        f"extra: {name}: found {list(place.shape)}, expected no such tensor"
        for name, place in found.items()
        if name not in wanted and not RECOMPUTED.search(name) and not _is_tied_copy(name, found)
    ]
    wrong = [
        f"misshapen: {name}: expected {list(entry.shape)}, found {list(found[name].shape)}"
        for name, entry in wanted.items()
        if name in found and found[name].shape != entry.shape
    ]
    wrong += [
        f"dtype: {name}: expected one of {', '.join(tensors.DTYPES)}, found {found[name].code}"
        for name in wanted
        if name in found and found[name].code not in tensors.DTYPES
    ]
    twice = [
        f"twice: {name}: stored as {hub_name(name)} too"
        for name in stored
        if hub_name(name) != name and hub_name(name) in stored
    ]
    kinds = (missing, extra, wrong, twice)
    if any(kinds):
        shown = []
        for problems in kinds:
            shown += problems[:_PROBLEMS_SHOWN]
            if len(problems) > _PROBLEMS_SHOWN:
                kind = problems[0].partition(":")[0]
                shown.append(f"and {len(problems) - _PROBLEMS_SHOWN} more {kind}")
        tie = "tied" if config.text.tie else "untied"
        lines = "\n  ".join(shown)
        raise ValueError(
            f"{folder}: {sum(map(len, kinds))} tensors do not fit its config.json "
            f"({config.family}, {config.text.layers} layers, {tie} head):\n  {lines}\n"
            "Is this the config of these weights? Copy both again from one place."
        )
    return {name: found[name] for name in wanted}


def _is_tied_copy(name: str, found: Mapping[str, tensors.Stored]) -> bool:
    """Whether a tied model's file carries its head as well, bit for bit the embedding (some trainers write it)."""
    head, embed = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if name != "lm_head.weight" or embed is None or head.code not in tensors.DTYPES:
        return False
    if (head.shape, head.code) != (embed.shape, embed.code):
        return False
    rows = max(1, streaming.BLOCK_BYTES // (head.shape[1] * head.dtype.itemsize))
    return all(
        tensors.read_rows(head, first, min(first + rows, head.shape[0])).tobytes()
        == tensors.read_rows(embed, first, min(first + rows, head.shape[0])).tobytes()
        for first in range(0, head.shape[0], rows)
    )


def _sources(
    wanted: Mapping[str, Published],
    found: Mapping[str, tensors.Stored],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, streaming.Source]:
    by_row: dict[Row, list[tensors.Stored]] = {}
    for name, entry in wanted.items():
        by_row.setdefault(entry.row, []).append(found[name])
    sources = {}
    for row, stored in by_row.items():
        offset, stacked = 0, "{}" in row.hub
        for name in row.ours:
            sources[name] = streaming.Source(row.kind, stacked, tuple(stored), offset)
            offset += shapes[name][-1] if row.kind != "same" else shapes[name][int(stacked)]
    lost = sorted(set(shapes) - set(sources))
    if lost:
        raise ValueError(f"models/weights.py: no row for parameters {lost}; add them to TABLES")
    return sources


def _places(model: QwenVL, shardings: Any, device: jax.Device | None) -> dict[str, Sharding]:
    if shardings is None:
        one = SingleDeviceSharding(device or jax.local_devices()[0])
        return {name: one for name, _ in named_leaves(model)}
    tree = shardings(model) if callable(shardings) else shardings
    return dict(named_leaves(tree))


def _exportable(model: QwenVL) -> dict[str, Any]:
    leaves = dict(named_leaves(model))
    adapters = sorted(name for name in leaves if "/lora_" in name)
    if adapters:
        raise ValueError(
            f"the model has {len(adapters)} LoRA leaves ({adapters[0]}, ...), which the published format "
            "does not hold; export models.lora.merge_lora(model)"
        )
    return leaves


def _default_dtype(source: str | None, leaves: Mapping[str, Any]) -> np.dtype:
    """The dtype of the source's tensors: that gives back the same bits. torch_dtype is only what its config says."""
    if source is not None:
        codes = {stored.code for stored in folders.stored_tensors(source).values()}
        if len(codes) == 1:
            return tensors.DTYPES[codes.pop()]
        if declared := companions.declared_dtype(folders.read_config(source)):
            return np.dtype(jnp.dtype(declared))
    return np.dtype(leaves["text/embed"].dtype)


def _split(
    wanted: Mapping[str, Published], itemsize: int, limit: int
) -> list[dict[str, Published]]:
    shards, filled = [{}], 0
    for name, entry in wanted.items():
        size = math.prod(entry.shape) * itemsize
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += size
    return shards


def _index(plan: Mapping[str, Mapping[str, Published]], itemsize: int) -> bytes:
    places = {
        name: file
        for file, entries in plan.items()
        for name in entries
        if file != folders.VALUE_HEAD
    }
    total = sum(
        math.prod(entry.shape) * itemsize
        for file, entries in plan.items()
        for entry in entries.values()
        if file != folders.VALUE_HEAD
    )
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"
