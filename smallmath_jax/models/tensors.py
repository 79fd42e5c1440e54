"""Safetensors files by range: any rows of any tensor, from a disk or an object store, never a whole file.

The `safetensors` library maps local files only, so a gs:// folder would have to be copied first, and a mapped file
counts as resident memory. The format is small enough to read and write here: 8 bytes of header length, a JSON header
with dtype, shape and byte range of each tensor, then the bytes. Tests hold both directions against the library.
"""

import concurrent.futures
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import IO

import fsspec
import ml_dtypes
import numpy as np
from fsspec.implementations.local import LocalFileSystem

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the library's own limit
_CHUNK = 8 << 20  # bytes of one range request
_THREADS = 4  # range requests in flight: one stream from an object store is slow


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file."""

    file: str
    code: str  # the format's dtype name, "BF16"
    shape: tuple[int, ...]
    start: int  # byte offset in the file

    @property
    def dtype(self) -> np.dtype:
        """Its numpy dtype; KeyError for a code that is not in DTYPES."""
        return DTYPES[self.code]


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a local path or URL, and the path inside it."""
    return fsspec.core.url_to_fs(str(path))


def read_header(file: str) -> dict[str, Stored]:
    """Name -> place of every tensor in one safetensors file.

    Raises ValueError, naming the file, when it is no safetensors file or was not written to its end.
    """
    fs, path = filesystem(file)
    size = fs.size(path)
    length = int.from_bytes(fs.cat_file(path, 0, 8), "little") if size >= 8 else -1
    if not 2 <= length <= _HEADER_LIMIT:
        raise ValueError(f"{file}: not a safetensors file ({size} bytes, header length {length})")
    if 8 + length > size:
        raise ValueError(_torn(file, 8 + length, size))
    try:
        header = json.loads(fs.cat_file(path, 8, 8 + length))
    except ValueError as error:
        raise ValueError(f"{file}: not a safetensors file (its header is no JSON)") from error
    header.pop("__metadata__", None)
    stored, end = {}, 8 + length
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        stored[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), first)
        wanted = last - first
        if entry["dtype"] in DTYPES:
            wanted = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if wanted != last - first:
            raise ValueError(
                f"{file}: {name} {entry['shape']} {entry['dtype']} needs {wanted} bytes, "
                f"the header gives it {last - first}; write the file again"
            )
        end = max(end, last)
    if end != size:
        raise ValueError(_torn(file, end, size))
    return stored


def _torn(file: str, wanted: int, size: int) -> str:
    return (
        f"{file}: torn file: the header promises {wanted} bytes, the file has {size}; "
        "download or export it again"
    )


def read_rows(
    stored: Stored, start: int = 0, stop: int | None = None, into: np.ndarray | None = None
) -> np.ndarray:
    """Rows start:stop of a tensor's first axis, in its own dtype: [stop - start, *shape[1:]], read into `into`."""
    stop = stored.shape[0] if stop is None else stop
    if into is None:
        into = np.empty((stop - start, *stored.shape[1:]), stored.dtype)
    data = into.reshape(-1).view(np.uint8)
    row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    fs, path = filesystem(stored.file)
    offset = stored.start + start * row_bytes

    def fill(first: int) -> None:
        last = min(first + _CHUNK, data.size)
        data[first:last] = np.frombuffer(fs.cat_file(path, offset + first, offset + last), np.uint8)

    if isinstance(fs, LocalFileSystem):
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            rest = memoryview(data)
            while rest and (count := file.readinto(rest)):
                rest = rest[count:]
        if rest:
            raise ValueError(f"{stored.file}: torn file: it became shorter while it was read")
    elif data.size:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fill, range(0, data.size, _CHUNK)))
    return into


def write_file(
    target: IO[bytes],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    pieces: Iterable[np.ndarray],
) -> None:
    """Writes one safetensors file of tensors `shapes`, all of `dtype`, from a stream of arrays.

    `pieces` concatenated in order are the tensors' elements in the order of `shapes`; they need not be cut at tensor
    borders and are cast one by one, so no more than one piece is held. ValueError when their bytes do not add up.
    """
    dtype = np.dtype(dtype)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    target.write(len(text).to_bytes(8, "little") + text)
    written = 0
    for piece in pieces:
        raw = np.ascontiguousarray(np.asarray(piece).astype(dtype, copy=False)).reshape(-1)
        written += raw.nbytes
        target.write(memoryview(raw.view(np.uint8)))
    if written != end:
        raise ValueError(f"tensors need {end} bytes, {written} were given")
