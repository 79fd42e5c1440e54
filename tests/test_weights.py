"""Model folders in and out, held against transformers' own modules, files and logits."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smallmath_jax.models import streaming, weight_table, weights
from smallmath_jax.models.config import from_hf
from smallmath_jax.models.tree import named_leaves
from smallmath_jax.models.value_head import add_value_head

# Exact parameter counts and tensor counts of the published files.
PUBLISHED = {
    "vl3b": (3_754_622_976, 824),
    "vl7b": (8_292_166_656, 729),
    "math1.5b": (1_543_714_304, 338),
    "math7b": (7_615_616_512, 339),
    "qwen0.5b": (494_032_768, 290),
    "phi3": (3_821_079_552, 195),
}
_TEXT_SIZES = {  # hidden, layers, heads, kv heads, intermediate, vocabulary rows, tied
    "vl3b": (2048, 36, 16, 2, 11008, 151936, True),
    "vl7b": (3584, 28, 28, 4, 18944, 152064, False),
    "math1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "math7b": (3584, 28, 28, 4, 18944, 152064, False),
    "qwen0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "phi3": (3072, 32, 32, 32, 8192, 32064, False),
}


def published_config(name: str) -> dict:
    """A flat config.json with the published sizes."""
    hidden, layers, heads, kv_heads, intermediate, rows, tie = _TEXT_SIZES[name]
    config = {
        "model_type": "phi3" if name == "phi3" else "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": rows,
        "tie_word_embeddings": tie,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if name.startswith("vl"):
        config |= {
            "model_type": "qwen2_5_vl",
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "num_heads": 16,
                "intermediate_size": 3420,
                "out_hidden_size": hidden,
                "in_chans": 3,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
            },
        }
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_name_maps(name):
    """Names and shapes are those of transformers' module on the meta device; counts are the published ones."""
    flat = published_config(name)
    parameters, count = PUBLISHED[name]
    ours = {n: t.shape for n, t in weight_table.hub_tensors(from_hf(flat)).items()}
    assert len(ours) == count
    assert sum(int(np.prod(shape)) for shape in ours.values()) == parameters
    config = transformers.AutoConfig.for_model(**flat)
    build = {
        "qwen2": transformers.Qwen2ForCausalLM,
        "phi3": transformers.Phi3ForCausalLM,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    }[flat["model_type"]]
    with torch.device("meta"):
        model = build(config)
    theirs = {
        re.sub(r"^model\.(visual|language_model)\.", _drop, n): tuple(p.shape)
        for n, p in model.named_parameters(remove_duplicate=True)
    }
    assert ours == theirs


def _drop(match: re.Match) -> str:
    return {"visual": "visual.", "language_model": "model."}[match[1]]


@pytest.fixture(scope="module", params=tiny_hf.KINDS)
def theirs(request, tmp_path_factory):
    """(kind, torch model, the folder transformers saved it to)."""
    model = tiny_hf.make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


def torch_leaf(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Our leaf `name` read out of the torch modules by attribute, not by tensor name."""
    parts = name.split("/")
    body = model.model
    tower = body.visual if parts[0] == "vision" else getattr(body, "language_model", body)
    if parts[1] == "layers":
        return torch.stack([_layer_leaf(layer, *parts[2:]) for layer in tower.layers])
    if parts[1] == "blocks":
        return torch.stack([_block_leaf(block, *parts[2:]) for block in tower.blocks])
    if parts[1] == "merger":
        return _merger_leaf(tower.merger, *parts[2:])
    return {
        "embed": lambda: tower.embed_tokens.weight,
        "norm": lambda: tower.norm.weight,
        "lm_head": lambda: model.lm_head.weight,
        "patch_embed": lambda: tower.patch_embed.proj.weight.flatten(1).T,
    }[parts[1]]()


def _layer_leaf(layer, name, end="weight"):
    end = {"kernel": "weight"}.get(end, end)
    if name in ("input_norm", "post_norm"):
        norm = layer.input_layernorm if name == "input_norm" else layer.post_attention_layernorm
        return norm.weight
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj") and name in ("q", "k", "v"):
        heads = attention.num_key_value_heads * attention.head_dim
        total = attention.qkv_proj.weight.shape[0]
        q, k, v = attention.qkv_proj.weight.split([total - 2 * heads, heads, heads])
        return {"q": q, "k": k, "v": v}[name].T
    if hasattr(mlp, "gate_up_proj") and name in ("gate", "up"):
        gate, up = mlp.gate_up_proj.weight.chunk(2)
        return {"gate": gate, "up": up}[name].T
    owner = attention if name in ("q", "k", "v", "o") else mlp
    value = getattr(getattr(owner, f"{name}_proj"), end)
    return value.T if value.ndim == 2 else value


def _block_leaf(block, name, end="weight"):
    end = {"kernel": "weight"}.get(end, end)
    if name in ("norm1", "norm2"):
        return getattr(block, name).weight
    if name in ("q", "k", "v"):
        fused = getattr(block.attn.qkv, end)
        value = fused.reshape(3, -1, *fused.shape[1:])["qkv".index(name)]
    else:
        owner = block.attn.proj if name == "proj" else getattr(block.mlp, f"{name}_proj")
        value = getattr(owner, end)
    return value.T if value.ndim == 2 else value


def _merger_leaf(merger, name, end="weight"):
    if name == "ln_q":
        return merger.ln_q.weight
    linear = merger.mlp[{"fc1": 0, "fc2": 2}[name]]
    return linear.weight.T if end == "kernel" else linear.bias


def assert_same_leaves(model, other):
    """Bit for bit the same tree."""
    ours, theirs = dict(named_leaves(model)), dict(named_leaves(other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        left, right = np.asarray(ours[name]), np.asarray(theirs[name])
        assert left.dtype == right.dtype, name
        assert left.tobytes() == right.tobytes(), name


def assert_same_files(folder, other):
    """The same tensors under the same names, bit for bit, however they are sharded."""
    left, right = read_all(folder), read_all(other)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


def read_all(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_import_is_their_modules_and_computes_their_logits(theirs, monkeypatch):
    kind, model, folder = theirs
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1000)  # several blocks a leaf
    ours, config = weights.import_folder(folder)
    leaves = dict(named_leaves(ours))
    assert ("text/lm_head" in leaves) == (not kind.endswith("_tied"))
    for name, leaf in leaves.items():
        expected = torch_leaf(model, name).detach().numpy()
        np.testing.assert_array_equal(np.asarray(leaf), expected, err_msg=name)
    count = sum(p.numel() for p in model.parameters())
    assert sum(leaf.size for leaf in leaves.values()) == count
    inputs = tiny_hf.example(kind)
    difference = tiny_hf.our_logits(ours, config, inputs) - tiny_hf.torch_logits(model, inputs)
    assert np.abs(difference).max() < 2e-4


def test_export_loads_in_transformers_with_equal_logits(theirs, tmp_path):
    kind, model, folder = theirs
    ours, config = weights.import_folder(folder)
    out = tmp_path / "out"
    weights.export_folder(ours, config, out, source=folder, max_shard_bytes=50_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert all((out / file).stat().st_size < 85_000 for file in index["weight_map"].values())
    assert_same_files(folder, out)
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    again, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = tiny_hf.example(kind)
    np.testing.assert_array_equal(
        tiny_hf.torch_logits(again.eval(), inputs), tiny_hf.torch_logits(model, inputs)
    )
    second, _ = weights.import_folder(out)
    assert_same_leaves(ours, second)
    flat = json.loads((out / "config.json").read_text())
    assert flat["rope_theta"] in (1e6, 1e4) and not {"text_config", "rope_parameters"} & set(flat)
    index_bytes = sum(t.numel() * t.element_size() for t in read_all(out).values())
    assert index["metadata"]["total_size"] == index_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_through_fp32_masters_keeps_its_bits(dtype, tmp_path):
    model = tiny_hf.make("vl_untied", dtype)
    model.save_pretrained(tmp_path / "in", max_shard_size="30KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    ours, config = weights.import_folder(tmp_path / "in")
    assert {leaf.dtype for _, leaf in named_leaves(ours)} == {np.dtype(np.float32)}
    weights.export_folder(ours, config, tmp_path / "out", source=tmp_path / "in")
    assert_same_files(tmp_path / "in", tmp_path / "out")
    declared = json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"]
    assert declared == str(dtype).removeprefix("torch.")
    assert type(model).from_pretrained(tmp_path / "out").dtype == dtype
    again, _ = weights.import_folder(tmp_path / "out")
    assert_same_leaves(ours, again)


def test_import_and_export_in_a_chosen_dtype(tmp_path):
    model = tiny_hf.make("qwen2_tied")
    model.save_pretrained(tmp_path / "in")
    ours, config = weights.import_folder(tmp_path / "in", dtype=jnp.bfloat16)
    expected = model.model.embed_tokens.weight.to(torch.bfloat16)
    assert (
        np.asarray(ours.text.embed[...]).tobytes() == expected.view(torch.uint8).numpy().tobytes()
    )
    weights.export_folder(ours, config, tmp_path / "out", dtype="float16")
    tensors = read_all(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert torch.equal(tensors["model.embed_tokens.weight"], expected.to(torch.float16))


def test_names_of_newer_transformers_and_a_stored_tied_head_import_alike(tmp_path):
    model = tiny_hf.make("vl_tied")
    model.save_pretrained(tmp_path / "hub")
    (tmp_path / "new").mkdir()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert "model.visual.patch_embed.proj.weight" in state and "lm_head.weight" in state
    state["model.visual.rotary_pos_emb.inv_freq"] = torch.ones(2)  # some old files carry it
    save_file(state, tmp_path / "new/model.safetensors")
    (tmp_path / "new/config.json").write_bytes((tmp_path / "hub/config.json").read_bytes())
    ours, config = weights.import_folder(tmp_path / "hub")
    newer, same = weights.import_folder(tmp_path / "new")
    assert_same_leaves(ours, newer)
    assert config.text == same.text


def test_a_flat_source_config_is_kept_but_for_what_changed(tmp_path):
    model = tiny_hf.make("qwen2_untied")
    model.save_pretrained(tmp_path / "in")
    ours, config = weights.import_folder(tmp_path / "in")
    weights.export_folder(ours, config, tmp_path / "flat")
    source = json.loads((tmp_path / "flat/config.json").read_text())
    source |= {"max_window_layers": 21, "transformers_version": "4.40.0", "added_by_hand": [1]}
    (tmp_path / "flat/config.json").write_text(json.dumps(source))
    weights.export_folder(ours, config, tmp_path / "same", source=tmp_path / "flat")
    assert json.loads((tmp_path / "same/config.json").read_text()) == source
    weights.export_folder(
        ours, config, tmp_path / "half", source=tmp_path / "flat", dtype=jnp.bfloat16
    )
    half = json.loads((tmp_path / "half/config.json").read_text())
    assert half == source | {"torch_dtype": "bfloat16"}


def test_value_head_lies_in_a_file_of_its_own(tmp_path):
    model = tiny_hf.make("qwen2_tied")
    model.save_pretrained(tmp_path / "in")
    ours, config = weights.import_folder(tmp_path / "in")
    ours = add_value_head(ours, jax.random.key(7))
    weights.export_folder(ours, config, tmp_path / "out", source=tmp_path / "in")
    head = load_file(tmp_path / "out/value_head.safetensors")
    assert {name: tuple(t.shape) for name, t in head.items()} == {
        "value_head.weight": (1, 32),
        "value_head.bias": (1,),
    }
    np.testing.assert_array_equal(head["value_head.weight"].T, ours.value_head.kernel[...])
    # an index says which files are the model, for loaders that would read every *.safetensors
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert "value_head.safetensors" not in index["weight_map"].values()
    assert_same_files(tmp_path / "in", tmp_path / "out")
    again, _ = weights.import_folder(tmp_path / "out")
    assert_same_leaves(ours, again)
    type(model).from_pretrained(tmp_path / "out")


def test_a_trained_model_is_what_is_written(tmp_path):
    model = tiny_hf.make("phi3")
    model.save_pretrained(tmp_path / "in")
    ours, config = weights.import_folder(tmp_path / "in")
    trained = jax.tree.map(lambda leaf: leaf * 1.5, ours)
    weights.export_folder(trained, config, tmp_path / "out", source=tmp_path / "in")
    before, after = read_all(tmp_path / "in"), read_all(tmp_path / "out")
    assert all(torch.equal(after[name], 1.5 * before[name]) for name in before)
