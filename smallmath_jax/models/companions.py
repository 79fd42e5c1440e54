"""What stands beside the tensors of a model folder: config, generation config, tokenizer, preprocessor.

Written so that transformers 4.49 reads it too. Three things that version 5 saves break version 4 without it: nested
config.json (rope_theta silently becomes 10000), `TokenizersBackend` as tokenizer class, and `extra_special_tokens`
as a list.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from smallmath_jax.data.images import ImageSettings
from smallmath_jax.models import folders
from smallmath_jax.models.config import ModelConfig, from_hf, to_hf

_GENERATION = "generation_config.json"
_PREPROCESSOR = "preprocessor_config.json"


def model_config(folder: str) -> ModelConfig:
    """The ModelConfig of a folder: config.json, and the EOS ids of generation_config.json where there is one."""
    config = folders.read_config(folder)
    generation = None
    if _GENERATION in folders.names(folder):
        generation = folders.read_json(folder, _GENERATION)
    try:
        return from_hf(config, generation)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype a config.json names: transformers wrote `torch_dtype`, then `dtype`, on top or in text_config."""
    for part in (config, config.get("text_config") or {}):
        for key in ("torch_dtype", "dtype"):
            if isinstance(part.get(key), str):
                return part[key]
    return None


def write(
    open_file: folders.OpenFile,
    config: ModelConfig,
    *,
    source: str | None,
    tokenizer: Any,
    dtype: str,
    image_settings: ImageSettings | None,
) -> None:
    """Writes everything but the tensors, config.json last. See `weights.export_folder` for the arguments."""
    files = dict(_copied(source, folders.OTHER_FILES))
    if tokenizer is not None:
        files |= dict(_saved_tokenizer(tokenizer))
    else:
        files |= dict(_copied(source, folders.TOKENIZER_FILES))
    if "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = _tokenizer_config(files["tokenizer_config.json"])
    files[_GENERATION] = _generation(config, files.get(_GENERATION))
    if config.vision is not None and _PREPROCESSOR not in files:
        files[_PREPROCESSOR] = _preprocessor(config, image_settings or ImageSettings())
    files[folders.CONFIG] = _dump(_config(config, source, dtype))  # last: it makes the folder one
    for name, content in files.items():
        with open_file(name) as target:
            target.write(content)


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _copied(source: str | None, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    if source is not None:
        for name in folders.companions(source, patterns):
            yield name, folders.read_bytes(source, name)


def _saved_tokenizer(tokenizer: Any) -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in folders.companions(folder, folders.TOKENIZER_FILES):
            with open(os.path.join(folder, name), "rb") as file:
                yield name, file.read()


def _tokenizer_config(content: bytes) -> bytes:
    """The same settings under the names version 4 knows; untouched where version 5 did not write them."""
    settings = json.loads(content)
    special = settings.get("extra_special_tokens")
    if settings.get("tokenizer_class") != "TokenizersBackend" and not isinstance(special, list):
        return content
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(special, list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings.pop("backend", None)
    return _dump(settings)


def _generation(config: ModelConfig, content: bytes | None) -> bytes:
    """The source's generation config with our EOS ids, or one that holds the special ids alone."""
    eos = list(config.eos_ids)
    if content is None:
        ids = {"bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}
        known = {name: value for name, value in ids.items() if value not in (None, [])}
        return _dump({**known, "transformers_version": "4.41.2"})
    settings = json.loads(content)
    old = settings.get("eos_token_id")
    if eos and set(eos) != set(old if isinstance(old, list) else [old]):
        return _dump({**settings, "eos_token_id": eos})
    return content


def _preprocessor(config: ModelConfig, settings: ImageSettings) -> bytes:
    """preprocessor_config.json of Qwen2VLImageProcessor; patch sizes are those of the model."""
    vision = config.vision
    return _dump(
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(settings.mean),
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": list(settings.std),
            "max_pixels": settings.max_pixels,
            "merge_size": vision.merge,
            "min_pixels": settings.min_pixels,
            "patch_size": vision.patch,
            "processor_class": "Qwen2_5_VLProcessor",
            "temporal_patch_size": vision.temporal_patch,
        }
    )


def _config(config: ModelConfig, source: str | None, dtype: str) -> dict[str, Any]:
    """The source's config.json with what changed, or a new flat one where version 5 wrote the source's."""
    ours = to_hf(config, dtype)
    if source is None:
        return ours
    original = folders.read_config(source)
    if "text_config" in original or "rope_parameters" in original:
        return ours
    before = to_hf(model_config(source), dtype)
    result = {key: value for key, value in original.items() if key != "dtype"}
    result["torch_dtype"] = dtype
    for key, value in ours.items():
        if value != before.get(key):
            result[key] = value
    return result
