"""Tiny random models of transformers itself, and the logits of both sides, for the tests of model folders."""

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from smallmath_jax.data.images import ImageSettings, patchify, token_index, vision_row
from smallmath_jax.data.positions import mrope_positions
from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.qwen_vl import QwenVL, forward, head_matrix

IMAGE, VIDEO, START, END, EOS = 90, 91, 92, 93, 2
SETTINGS = ImageSettings()
_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "tokens_per_second": 2,
    "fullatt_block_indexes": [1],
}
KINDS = ("vl_untied", "vl_tied", "qwen2_untied", "qwen2_tied", "phi3")


def make(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """One of KINDS with random weights, biases and norms included, of a size where every bug shows in the logits."""
    tie = kind.endswith("_tied")
    if kind.startswith("vl"):
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
        config = transformers.Qwen2_5_VLConfig(
            text_config=_TEXT | {"rope_parameters": rope},
            vision_config=dict(_VISION),
            tie_word_embeddings=tie,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )
        build = transformers.Qwen2_5_VLForConditionalGeneration
    elif kind.startswith("qwen2"):
        config = transformers.Qwen2Config(
            **_TEXT,
            tie_word_embeddings=tie,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
        build = transformers.Qwen2ForCausalLM
    else:
        config = transformers.Phi3Config(
            **_TEXT,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
        build = transformers.Phi3ForCausalLM
    generator = torch.Generator().manual_seed(len(kind))
    model = build(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.2 * noise)
    return model.to(dtype)


def example(kind: str) -> dict[str, np.ndarray]:
    """Token ids [1, T] and, for a vision model, one image's pixels [P, 1176] and grid [1, 3]."""
    random = np.random.default_rng(0)
    ids = random.integers(3, 80, 14)
    if not kind.startswith("vl"):
        return {"ids": ids[None]}
    image = random.integers(0, 256, (150, 160, 3), dtype=np.uint8)
    pixels, grid = patchify(image[None], SETTINGS)
    count = int(np.prod(grid)) // 4
    ids = np.concatenate([ids[:3], [START], [IMAGE] * count, [END], ids[3:]])
    return {"ids": ids[None], "pixels": pixels, "grid": np.array([grid]), "image": image}


def torch_logits(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [T, V] of transformers 5."""
    ids = torch.tensor(inputs["ids"])
    extra = {}
    if "pixels" in inputs:
        extra = {
            "pixel_values": torch.tensor(inputs["pixels"]),
            "image_grid_thw": torch.tensor(inputs["grid"]),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **extra).logits[0].float().numpy()


def our_logits(model: QwenVL, config: ModelConfig, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [T, V] of smallmath_jax."""
    ids = inputs["ids"][0]
    grids = inputs.get("grid", np.zeros((0, 3), np.int32))
    image, video = (IMAGE, VIDEO) if "pixels" in inputs else (None, None)
    positions, _ = mrope_positions(ids, grids, image, video, SETTINGS)
    vision = None
    if "pixels" in inputs:
        row = vision_row(inputs["pixels"], grids, len(inputs["pixels"]), SETTINGS)
        row["token_index"] = token_index(ids, image, video)
        vision = {name: jnp.asarray(value)[None] for name, value in row.items()}
    segments = jnp.ones((1, len(ids)), jnp.int32)
    hidden = forward(model, jnp.asarray(ids)[None], jnp.asarray(positions)[None], segments, vision)
    return np.asarray(hidden[0] @ head_matrix(model).T)
