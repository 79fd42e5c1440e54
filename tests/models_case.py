"""Tiny random models of transformers and the same weights as ours, for the parity tests of models.

Chosen so that bugs show: vision blocks of both kinds, uneven mRoPE sections, biases and norm weights that are not their
initial zeros and ones.
"""

import copy
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from smallmath_jax.data.images import ImageSettings, token_index, vision_row
from smallmath_jax.data.positions import mrope_positions
from smallmath_jax.models.qwen_vl import QwenVL, forward, head_matrix
from smallmath_jax.models.weights import export_folder, import_folder

IMAGE, VIDEO, START, END, EOS = 90, 91, 92, 93, 2
WORDS = 90  # ids below are text
SETTINGS = ImageSettings()
TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_heads": 2,
    "out_hidden_size": 64,
    "tokens_per_second": 2,
    "fullatt_block_indexes": [1],
}
# Compiling takes most of these tests' time; without LLVM's optimisation it takes half.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def torch_model(family: str, tie: bool = False, **changes) -> torch.nn.Module:
    """A random fp32 model of transformers with eager attention."""
    text = TEXT | changes
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
        config = transformers.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope},
            vision_config=dict(VISION),
            tie_word_embeddings=tie,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )
        build = transformers.Qwen2_5_VLForConditionalGeneration
    elif family == "qwen2":
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = transformers.Qwen2Config(**text, tie_word_embeddings=tie, rope_parameters=rope)
        build = transformers.Qwen2ForCausalLM
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = transformers.Phi3Config(**text, rope_parameters=rope)
        build = transformers.Phi3ForCausalLM
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(7)
    model = build(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.15 * noise)
    return model


def our_model(model: torch.nn.Module) -> QwenVL:
    """The same numbers as our parameter tree."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return import_folder(folder)[0]


def our_gradients(model: torch.nn.Module) -> QwenVL:
    """The .grad of every parameter, as our parameter tree."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for target, source in zip(holder.parameters(), model.parameters(), strict=True):
            target.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    return our_model(holder)


def image_text(random: np.random.Generator, grid, kind: int = IMAGE) -> list[int]:
    """start, the vision tokens of a grid, end."""
    return [START] + [kind] * (int(np.prod(grid)) // 4) + [END]


def words(random: np.random.Generator, count: int) -> list[int]:
    return random.integers(3, WORDS, count).tolist()


def pixels_for(random: np.random.Generator, grids) -> np.ndarray:
    """float32 [P, 1176] noise for some grids."""
    count = sum(int(np.prod(grid)) for grid in grids)
    return random.normal(size=(count, 1176)).astype(np.float32)


def make_batch(rows: list[dict], length: int, patches: int = 0, left: bool = False) -> dict:
    """Our batch of `rows` (ids, and with images: pixels, grids, seconds), each padded to `length` and `patches`."""
    batch = {"tokens": [], "positions": [], "segment_ids": []}
    vision = []
    for row in rows:
        ids = np.array(row["ids"], int)
        grids = np.array(row.get("grids", [])).reshape(-1, 3).astype(int)
        positions, _ = mrope_positions(ids, grids, IMAGE, VIDEO, SETTINGS, row.get("seconds"))
        pad = length - len(ids)
        sides = (pad, 0) if left else (0, pad)
        batch["tokens"].append(np.pad(ids, sides))
        batch["positions"].append(np.pad(positions, ((0, 0), sides)))
        batch["segment_ids"].append(np.pad(np.ones(len(ids), int), sides))
        if patches:
            picture = vision_row(row.get("pixels"), grids, patches, SETTINGS)
            vision.append(picture | {"token_index": token_index(batch["tokens"][-1], IMAGE, VIDEO)})
    result = {name: jnp.asarray(np.stack(value)) for name, value in batch.items()}
    if patches:
        result["vision"] = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *vision)
    return result


def our_logits(model: QwenVL, batch: dict, **options) -> jax.Array:
    """Logits [B, T, V]."""
    places = batch["tokens"], batch["positions"], batch["segment_ids"]
    hidden = forward(model, *places, batch.get("vision"), **options)
    return hidden @ head_matrix(model).astype(hidden.dtype).T


def torch_inputs(rows: list[dict], length: int, left: bool, own_positions: bool) -> dict:
    """The same rows as transformers takes them; with own_positions our mRoPE positions are handed over."""
    batch = make_batch(rows, length, 0, left)
    ids = torch.tensor(np.asarray(batch["tokens"]), dtype=torch.long)
    mask = torch.tensor(np.asarray(batch["segment_ids"]), dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    images, videos = [], []
    for row in rows:
        offset = 0
        for grid in row.get("grids", []):
            count = int(np.prod(grid))
            taken = row["pixels"][offset : offset + count]
            (videos if VIDEO in row["ids"] else images).append((taken, grid))
            offset += count
    for name, grid_name, found in (
        ("pixel_values", "image_grid_thw", images),
        ("pixel_values_videos", "video_grid_thw", videos),
    ):
        if found:
            inputs[name] = torch.tensor(np.concatenate([pixels for pixels, _ in found]))
            inputs[grid_name] = torch.tensor([grid for _, grid in found])
    if images or videos:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    if own_positions:
        positions = np.asarray(batch["positions"]).swapaxes(0, 1)
        inputs["position_ids"] = torch.tensor(positions, dtype=torch.long)
    return inputs


def export(model: QwenVL, folder) -> None:
    export_folder(model, model.config, str(folder))
