"""Hugging Face model folders: finding one, reading its JSON and tensor index, publishing a new one whole.

A folder is a local directory, a URL fsspec knows (gs://BUCKET/DIR) or a hub name (OWNER/NAME).
"""

import contextlib
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import IO

import huggingface_hub

from smallmath_jax.models import tensors

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
VALUE_HEAD = "value_head.safetensors"

# What an export takes over from its source, beside tensors and config.json.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
OTHER_FILES = (
    "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip

OpenFile = Callable[[str], IO[bytes]]


def locate(path: str) -> str:
    """The local directory or URL of a model folder; a hub name is downloaded first (all but other weight formats).

    Raises FileNotFoundError saying what to do when there is no such folder, or the hub cannot be reached.
    """
    path = str(path)
    if "://" in path:
        return path.rstrip("/")
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise FileNotFoundError(f"{path} is a file; give the model folder it lies in")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise FileNotFoundError(f"{path}: no such folder (and no hub name, which reads OWNER/NAME)")
    wanted = ["*.json", "*.safetensors", *TOKENIZER_FILES, *OTHER_FILES]
    try:
        return huggingface_hub.snapshot_download(path, allow_patterns=sorted(set(wanted)))
    except Exception as error:  # network, name, licence gate: the remedy is the same
        reason = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{path}: no such local folder, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {reason}). Check the name and HF_TOKEN, or run `hf download {path} "
            "--local-dir DIR` where there is a network and pass DIR (or its gs:// copy) instead"
        ) from error


def same(folder: str, other: str) -> bool:
    """Whether two paths mean one place."""
    if "://" in folder or "://" in other:
        return folder.rstrip("/") == other.rstrip("/")
    return os.path.realpath(folder) == os.path.realpath(other)


def names(folder: str) -> list[str]:
    """Sorted names of the files in a folder; FileNotFoundError when there is none."""
    fs, path = tensors.filesystem(folder)
    fs.invalidate_cache()  # another host may have written since this one looked
    if not fs.isdir(path):
        raise FileNotFoundError(f"{folder}: no such folder")
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))


def read_bytes(folder: str, name: str) -> bytes:
    """One whole file of a folder."""
    fs, path = tensors.filesystem(f"{folder}/{name}")
    return fs.cat_file(path)


def read_json(folder: str, name: str) -> dict:
    """One JSON file of a folder; ValueError naming it when it is no JSON object."""
    try:
        value = json.loads(read_bytes(folder, name))
    except ValueError as error:
        raise ValueError(f"{folder}/{name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{folder}/{name}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(folder: str) -> dict:
    """config.json as a dict; FileNotFoundError with a hint when the folder is not a model folder."""
    present = names(folder)
    if CONFIG in present:
        return read_json(folder, CONFIG)
    hint = f"it holds {', '.join(present[:8]) or 'nothing'}"
    if "adapter_config.json" in present:
        hint = "it holds a LoRA adapter; merge it into its base model first"
    elif "export" in present:
        hint = f"it looks like a run's workdir: give {folder}/export"
    elif INDEX in present or any(name.endswith(".safetensors") for name in present):
        hint = "its tensors are there, so copy or finish the export; config.json is written last"
    raise FileNotFoundError(f"{folder}: not a Hugging Face model folder: no {CONFIG} ({hint})")


def stored_tensors(folder: str) -> dict[str, tensors.Stored]:
    """Every tensor of a folder's model, under the name its file gives it (single file or sharded with an index).

    Raises FileNotFoundError for a folder without safetensors or with a shard missing, ValueError for a torn file or
    for an index that names a tensor its shard does not hold.
    """
    present = names(folder)
    if WHOLE in present:
        return tensors.read_header(f"{folder}/{WHOLE}")
    if INDEX not in present:
        hint = ""
        if any(fnmatch.fnmatch(name, "*.bin") for name in present):
            hint = "; it holds .bin weights: load and save it once with transformers, which writes safetensors"
        raise FileNotFoundError(f"{folder}: neither {WHOLE} nor {INDEX}{hint}")
    places = read_json(folder, INDEX)["weight_map"]
    absent = sorted(set(places.values()) - set(present))
    if absent:
        raise FileNotFoundError(
            f"{folder}: {INDEX} names files that are not there: {', '.join(absent)}"
        )
    stored = {}
    for file in sorted(set(places.values())):
        header = tensors.read_header(f"{folder}/{file}")
        lost = sorted(
            name for name, place in places.items() if place == file and name not in header
        )
        if lost:
            raise ValueError(
                f"{folder}: {INDEX} places {lost[0]} (and {len(lost) - 1} more) in {file}, "
                "which does not hold it; download the folder again"
            )
        stored.update(header)
    return stored


def companions(folder: str, patterns: tuple[str, ...]) -> list[str]:
    """Names of the files in a folder that match any of the patterns."""
    return [
        name
        for name in names(folder)
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]


@contextlib.contextmanager
def publish(folder: str, overwrite: bool = False) -> Iterator[OpenFile]:
    """Gives a function that opens a new file of `folder` for writing; the folder appears whole or not at all.

    Local: files are written to FOLDER.partial-export, which is renamed at the end. An object store has no rename, so
    there the caller writes config.json last, and readers refuse a folder without it. FileExistsError when the folder
    holds anything and `overwrite` is false; only something that looks like a model folder is ever replaced.
    """
    folder = str(folder).rstrip("/")
    fs, path = tensors.filesystem(folder)
    present = names(folder) if fs.exists(path) else []
    if present and not overwrite:
        raise FileExistsError(f"{folder} is not empty; give another path, or say overwrite")
    if present and not any(name == CONFIG or name.endswith(".safetensors") for name in present):
        raise FileExistsError(
            f"{folder} holds files but no model; it is left alone, give another path"
        )
    if "://" in folder:
        if present:
            with contextlib.suppress(FileNotFoundError):
                fs.rm(f"{path}/{CONFIG}")  # first, so that nobody reads a half-deleted folder
            fs.rm(path, recursive=True)
        yield lambda name: fs.open(f"{path}/{name}", "wb")
        return
    partial, old = f"{folder}.partial-export", f"{folder}.replaced-export"
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    os.makedirs(partial)
    yield lambda name: open(os.path.join(partial, name), "wb")
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
