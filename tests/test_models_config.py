"""config.json in and out: published files, both layouts of transformers, exact sizes, and what is refused."""

import json

import models_case as case
import pytest
import transformers

from smallmath_jax.models.config import ModelConfig, from_hf, tiny_config, to_hf
from smallmath_jax.models.qwen_vl import abstract_model
from smallmath_jax.models.tree import parameter_count

VL_3B = {  # the published file of Qwen2.5-VL-3B-Instruct
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
VL_7B = VL_3B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vision_config": VL_3B["vision_config"] | {"out_hidden_size": 3584},
    "vocab_size": 152064,
}


def qwen2(hidden, layers, heads, kv_heads, intermediate, rows, tie):
    """The text-only files, which differ in these numbers."""
    return {
        "model_type": "qwen2",
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": rows,
        "tie_word_embeddings": tie,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "sliding_window": 4096,
        "use_sliding_window": False,
    }


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (VL_3B, 3_754_622_976),
        (VL_7B, 8_292_166_656),
        (qwen2(1536, 28, 12, 2, 8960, 151936, True), 1_543_714_304),
        (qwen2(3584, 28, 28, 4, 18944, 152064, False), 7_615_616_512),
        (qwen2(896, 24, 14, 2, 4864, 151936, True), 494_032_768),
    ],
)
def test_published_parameter_counts(config, count):
    assert parameter_count(abstract_model(from_hf(config))) == count


def test_published_file_is_read_whole():
    config = from_hf(VL_3B, {"eos_token_id": [151645, 151643], "pad_token_id": 151643})
    assert config.text.head_dim == 128 and config.text.mrope_section == (16, 24, 24)
    assert config.text.rope_theta == 1e6 and config.text.rms_eps == 1e-6 and config.text.tie
    assert config.text.sliding_window is None  # use_sliding_window is false
    assert config.vision.hidden == 1280 and config.vision.tokens_per_second == 2
    assert config.eos_ids == (151645, 151643) and config.pad_id == 151643
    assert {config: 1}[config] == 1  # hashable: a static argument


@pytest.mark.parametrize("published", [VL_3B, VL_7B, qwen2(896, 24, 14, 2, 4864, 151936, True)])
def test_written_file_says_what_was_read(published):
    written = to_hf(from_hf(published))
    assert json.loads(json.dumps(written)) == written
    assert from_hf(written) == from_hf(published)
    ignored = ("vision_token_id", "max_window_layers", "sliding_window", "vision_config")
    for key, value in published.items():
        assert key in ignored or written[key] == value, key
    for key, value in published.get("vision_config", {}).items():
        assert written["vision_config"][key] == value, key


def test_written_file_means_the_same_to_transformers(tmp_path):
    """The layout of transformers 5 breaks version 4, so the flat one is written; version 5 must read it too."""
    (tmp_path / "config.json").write_text(json.dumps(to_hf(from_hf(VL_3B))))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert config.text_config.rms_norm_eps == 1e-6 and config.tie_word_embeddings
    assert config.vision_config.hidden_size == 1280 and config.vision_config.tokens_per_second == 2


@pytest.mark.parametrize("tie", [True, False])
def test_nested_and_flat_layout_agree(tie, tmp_path):
    model = case.torch_model("qwen2_5_vl", tie)
    model.config.save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in nested and "hidden_size" not in nested
    config = from_hf(nested)
    assert config.text.tie is tie and config.text.rope_theta == 1e6
    assert config.text.mrope_section == (2, 3, 3) and config.vision.full_attention_blocks == (1,)
    assert from_hf(to_hf(config)) == config


def test_phi3_keeps_its_window():
    source = transformers.Phi3Config(sliding_window=2047).to_dict()
    config = from_hf(source, {"eos_token_id": [32000, 32001, 32007]})
    assert config.text.sliding_window == 2047 and config.text.head_dim == 96
    assert not config.text.qkv_bias and config.eos_ids == (32000, 32001, 32007)
    assert from_hf(to_hf(config)).text == config.text
    assert parameter_count(abstract_model(config)) == 3_821_079_552


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported; known: qwen2_5_vl"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' is missing"),
        ({"tie_word_embeddings": None}, "'tie_word_embeddings' is missing"),
        ({"rope_theta": None}, "'rope_theta' is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rotary scaling"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vision_config": VL_3B["vision_config"] | {"window_size": None}}, "'window_size'"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, message):
    changed = {key: value for key, value in (VL_3B | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_hf(changed)


def test_tiny_config_round_trips():
    special = dict.fromkeys(("image_token_id", "video_token_id"), 5)
    special |= dict.fromkeys(("vision_start_token_id", "vision_end_token_id"), 6)
    config = tiny_config(300, **special, eos_ids=(7,), bos_id=8, pad_id=9)
    assert isinstance(config, ModelConfig) and sum(config.text.mrope_section) == 16
    assert from_hf(to_hf(config)) == config
    assert parameter_count(abstract_model(config)) < 1_000_000
