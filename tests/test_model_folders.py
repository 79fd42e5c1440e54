"""Model folders that are wrong, remote or half written, and what lies in them beside the tensors."""

import dataclasses
import json
import shutil

import fsspec
import huggingface_hub
import jax
import numpy as np
import pytest
import tiny_hf
import tokenizers
import torch
import transformers
from gcp_storage_emulator.server import create_server
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smallmath_jax.data.images import ImageSettings, patchify
from smallmath_jax.models import folders, lora, tensors, weights
from smallmath_jax.models.tree import named_leaves


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Qwen2 folder written by transformers, in shards; do not write into it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_hf.make("qwen2_untied").save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """An imported Qwen2.5-VL and its config."""
    folder = tmp_path_factory.mktemp("vision")
    tiny_hf.make("vl_tied").save_pretrained(folder)
    return weights.import_folder(folder)


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of `saved` as one file, and its tensors, to be spoilt and written back by `rewrite`."""
    state = {}
    for file in saved.glob("*.safetensors"):
        state |= load_file(file)
    shutil.copy(saved / "config.json", tmp_path)
    return tmp_path, state


def rewrite(broken) -> str:
    folder, state = broken
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_missing_extra_and_misshapen_tensors_are_all_named(broken):
    state = broken[1]
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.3.mlp.up_proj.weight"] = torch.zeros(40, 32)
    state["model.norm.weight"] = torch.zeros(31)
    state["lm_head.weight"] = torch.zeros(96, 32, dtype=torch.int8)
    with pytest.raises(ValueError) as caught:
        weights.import_folder(rewrite(broken))
    text = str(caught.value)
    assert str(broken[0]) in text and "4 tensors" in text
    assert "missing: model.layers.1.mlp.up_proj.weight: expected [40, 32]" in text
    assert "extra: model.layers.3.mlp.up_proj.weight: found [40, 32]" in text
    assert "misshapen: model.norm.weight: expected [32], found [31]" in text
    assert "dtype: lm_head.weight: expected one of F32, BF16, F16, found I8" in text


def test_a_transposed_matrix_is_misshapen(broken):
    name = "model.layers.0.mlp.down_proj.weight"
    broken[1][name] = broken[1][name].T.contiguous()
    with pytest.raises(ValueError, match=r"expected \[32, 40\], found \[40, 32\]"):
        weights.import_folder(rewrite(broken))


def test_many_problems_of_a_kind_are_cut_short_and_hide_no_other(broken):
    broken[1].clear()
    broken[1]["encoder.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"and 19 more missing\n  extra: encoder.weight"):
        weights.import_folder(rewrite(broken))


def test_a_tensor_stored_under_both_its_names_is_named(broken):
    norm = broken[1]["model.norm.weight"]
    broken[1]["model.language_model.norm.weight"] = norm.clone()
    with pytest.raises(ValueError, match="twice: model.language_model.norm.weight"):
        weights.import_folder(rewrite(broken))


def test_a_tied_head_that_differs_from_the_embedding_is_extra(broken):
    folder, state = broken
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"extra: lm_head.weight: found \[96, 32\]"):
        weights.import_folder(rewrite(broken))
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    model, _ = weights.import_folder(rewrite(broken))
    assert model.text.lm_head is None


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_torn_file_is_named(broken, keep):
    file = broken[0] / "model.safetensors"
    rewrite(broken)
    file.write_bytes(file.read_bytes()[:keep])
    reason = "torn file|not a safetensors file"
    with pytest.raises(ValueError, match=f"model.safetensors: ({reason})"):
        weights.import_folder(broken[0])


def test_a_file_that_is_no_safetensors_is_named(broken):
    (broken[0] / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(ValueError, match="not a safetensors file"):
        weights.import_folder(broken[0])


def test_missing_shards_and_lying_indexes_are_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    index = json.loads((tmp_path / folders.INDEX).read_text())
    lost = next(name for name, file in index["weight_map"].items() if file == shard.name)
    state = load_file(shard)
    del state[lost]
    save_file(state, shard)
    with pytest.raises(ValueError, match=f"places {lost}"):
        weights.import_folder(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"not there: {shard.name}"):
        weights.import_folder(tmp_path)


def test_folders_that_are_not_model_folders_say_why(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        weights.import_folder(tmp_path / "nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="is a file"):
        weights.import_folder(saved / "config.json")
    with pytest.raises(FileNotFoundError, match=r"no config.json \(it holds nothing\)"):
        weights.import_folder(tmp_path)
    (tmp_path / "export").mkdir()
    with pytest.raises(FileNotFoundError, match=f"give {tmp_path}/export"):
        weights.import_folder(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileNotFoundError, match="LoRA adapter"):
        weights.import_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        weights.import_folder(tmp_path)
    shutil.copy(saved / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="load and save it once with transformers"):
        weights.import_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=f"{tmp_path}.*llama"):
        weights.import_folder(tmp_path)


def test_an_unreachable_hub_gives_one_message_with_the_remedy(monkeypatch):
    def refuse(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="hf download Qwen/Qwen2.5-VL-3B.* gs://"):
        weights.import_folder("Qwen/Qwen2.5-VL-3B")


def test_a_hub_name_is_downloaded_and_read(saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(saved))
    _, config = weights.import_folder("Qwen/Qwen2.5-Math-7B")
    assert config.family == "qwen2"


def test_lora_must_be_merged_first(saved, tmp_path):
    model, config = weights.import_folder(saved)
    adapted = lora.add_lora(model, 2, 4.0, "text/layers/q", jax.random.key(0))
    with pytest.raises(ValueError, match="merge_lora"):
        weights.export_folder(adapted, config, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    weights.export_folder(lora.merge_lora(adapted), config, tmp_path / "out")


def test_an_export_appears_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    model, config = weights.import_folder(saved)
    out = tmp_path / "out"

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(weights.companions, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            weights.export_folder(model, config, out, source=saved)
        assert not out.exists()
    weights.export_folder(model, config, out, source=saved)
    (out / "stale").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        weights.export_folder(model, config, out, overwrite=False)
    weights.export_folder(model, config, out, source=saved)
    assert not (out / "stale").exists() and [entry.name for entry in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="came from"):
        weights.export_folder(model, config, out, source=out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").touch()
    with pytest.raises(FileExistsError, match="no model"):
        weights.export_folder(model, config, tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter1.tex").exists()


def test_an_object_store_works_like_a_disk_and_gets_config_json_last(saved, monkeypatch):
    model, config = weights.import_folder(saved)
    opened = []
    store = fsspec.filesystem("memory")
    really_open = type(store).open

    def watch(self, path, mode="rb", **options):
        if "w" in mode:
            opened.append(path.rsplit("/", 1)[-1])
        return really_open(self, path, mode, **options)

    monkeypatch.setattr(type(store), "open", watch)
    url = "memory://bucket/run/export"
    for _ in range(2):  # the second replaces the first
        weights.export_folder(model, config, url, source=saved, max_shard_bytes=40_000)
    assert opened[-1] == "config.json" and "model.safetensors.index.json" in opened
    again, same = weights.import_folder(url)
    for (name, left), (_, right) in zip(named_leaves(model), named_leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=name)
    assert same.text == config.text
    store.rm("/bucket/run/export/config.json")
    with pytest.raises(FileNotFoundError, match="config.json is written last"):
        weights.import_folder(url)


@pytest.mark.filterwarnings("ignore")  # gcsfs' and the emulator's own
def test_a_bucket_holds_a_model_folder(saved, monkeypatch):
    server = create_server("localhost", 0, in_memory=True, default_bucket="models")
    server.start()
    try:
        monkeypatch.setenv(
            "STORAGE_EMULATOR_HOST", f"http://localhost:{server._api._httpd.server_port}"
        )
        model, config = weights.import_folder(saved)
        url = "gs://models/run/export"
        weights.export_folder(model, config, url, source=saved, max_shard_bytes=40_000)
        weights.export_folder(model, config, url, source=saved)
        assert "model.safetensors" in folders.names(url) and folders.INDEX not in folders.names(url)
        again, _ = weights.import_folder(url)
        assert (
            again.text.layers.q.kernel[...].tobytes() == model.text.layers.q.kernel[...].tobytes()
        )
    finally:
        server.stop()


def test_a_written_file_is_what_the_library_reads(tmp_path):
    random = np.random.default_rng(0)
    arrays = {"a": random.normal(size=(7, 3)), "b": random.normal(size=(5,))}
    shapes = {name: array.shape for name, array in arrays.items()}
    pieces = [arrays["a"][:2], arrays["a"][2:], arrays["b"]]
    for code, dtype in tensors.DTYPES.items():
        with open(tmp_path / code, "wb") as file:
            tensors.write_file(file, shapes, dtype, iter(pieces))
        with safe_open(tmp_path / code, "pt") as opened:
            for name, array in arrays.items():
                expected = torch.tensor(array).to(opened.get_tensor(name).dtype)
                assert torch.equal(opened.get_tensor(name), expected)
    with open(tmp_path / "short", "wb") as file, pytest.raises(ValueError, match="were given"):
        tensors.write_file(file, shapes, np.dtype(np.float32), iter(pieces[:2]))


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_rows_are_what_the_library_slices(tmp_path, monkeypatch, scheme):
    monkeypatch.setattr(tensors, "_CHUNK", 16)
    value = torch.randn(9, 4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"x": torch.ones(3), "value": value}, tmp_path / "file")
    fsspec.filesystem("memory").pipe(str(tmp_path / "file"), (tmp_path / "file").read_bytes())
    stored = tensors.read_header(f"{scheme}{tmp_path}/file")["value"]
    assert (stored.shape, stored.code) == ((9, 4, 3), "BF16")
    rows = tensors.read_rows(stored, 2, 7)
    assert rows.tobytes() == value[2:7].contiguous().view(torch.uint8).numpy().tobytes()
    assert tensors.read_rows(stored).shape == (9, 4, 3)


def test_what_the_source_has_beside_tensors_is_kept(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "in")
    kept = {
        "tokenizer.model": b"\x00sentencepiece",
        "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer", "legacy": false}',
        "generation_config.json": b'{"eos_token_id": [2, 95],  "temperature": 0.5}',
        "LICENSE": b"theirs",
        "chat_template.jinja": b"{{ messages }}",
    }
    for name, content in kept.items():
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in/training_args.bin").touch()
    model, config = weights.import_folder(tmp_path / "in")
    assert config.eos_ids == (2, 95)
    out = tmp_path / "out"
    weights.export_folder(model, config, out, source=tmp_path / "in")
    for name, content in kept.items():
        assert (out / name).read_bytes() == content
    assert not (out / "training_args.bin").exists()


def test_a_tokenizer_is_written_so_that_version_4_reads_it(saved, tmp_path):
    model, config = weights.import_folder(saved)
    characters = {character: i for i, character in enumerate(sorted("abc"))}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(characters, [])),
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template="{{ messages[0]['content'] }}",
    )
    weights.export_folder(model, config, tmp_path / "out", source=tokenizer)
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in settings
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "a<|im_start|>b<|im_end|>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == tokenizer.chat_template and again.eos_token == "<|im_end|>"


def test_preprocessor_and_generation_config_are_written_where_there_are_none(
    vision_model, tmp_path
):
    model, config = vision_model
    config = dataclasses.replace(config, eos_ids=(2, 7))
    settings = ImageSettings(max_pixels=28 * 28 * 9)
    weights.export_folder(model, config, tmp_path / "out", image_settings=settings)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = np.random.default_rng(0).integers(0, 256, (150, 100, 3), dtype=np.uint8)
    theirs = processor(images=[image], return_tensors="np")
    ours, grid = patchify(image[None], settings)
    assert tuple(theirs["image_grid_thw"][0]) == grid
    np.testing.assert_allclose(ours, theirs["pixel_values"], atol=1e-6)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [2, 7] and generation.pad_token_id == 0
