"""TensorBoard event files as immutable parts: the same on a disk and on gs://, no TensorFlow, torch or protobuf.

An event file is a sequence of TFRecords, each a protobuf `Event` (tensorflow/core/util/event.proto). TensorBoard reads
all files of a folder in name order, so a part a flush is one run to it.
"""

import math
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

_PREFIX = "events.out.tfevents."


def write_events(
    folder: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], times: Sequence[float]
) -> None:
    """Publishes the finite numbers of `rows` (each with a `step`) as one event file, whole or not at all.

    The file tells TensorBoard that whatever it saw of these steps before is void (a run that was continued).

    Args:
        folder: of the event files.
        rows: one mapping a step; values that are no numbers are left out.
        times: seconds since the epoch, one a row.
    """
    first, last = int(rows[0]["step"]), int(rows[-1]["step"])
    events = [_event(times[0], file_version="brain.Event:2"), _event(times[0], first, restart=True)]
    for row, when in zip(rows, times, strict=True):
        events.append(_event(when, int(row["step"]), values=_numbers(row)))
    _publish(epath.Path(folder) / f"{_PREFIX}{last:010d}", b"".join(map(_record, events)))


def drop_events(folder: str | os.PathLike[str], step: int) -> None:
    """Deletes every event file that holds a step later than `step`."""
    root = epath.Path(folder)
    if not root.exists():
        return
    for path in root.glob(_PREFIX + "*"):
        last = path.name.removeprefix(_PREFIX)
        if last.isdigit() and int(last) > step:
            path.unlink(missing_ok=True)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: x for name, x in row.items() if isinstance(x, int | float) and name != "step"}
    return {name: float(x) for name, x in numbers.items() if math.isfinite(x)}


def _event(
    when: float,
    step: int = 0,
    file_version: str = "",
    values: Mapping[str, float] | None = None,
    restart: bool = False,
) -> bytes:
    """A protobuf Event: wall_time = 1, step = 2, file_version = 3, summary = 5, session_log = 7."""
    message = b"\x09" + struct.pack("<d", when) + b"\x10" + _varint(step)
    if file_version:
        message += _text(3, file_version.encode())
    for tag, value in (values or {}).items():  # Summary.Value: tag = 1, simple_value = 2
        entry = _text(1, tag.encode()) + b"\x15" + struct.pack("<f", value)
        message += _text(5, _text(1, entry))
    if restart:
        message += _text(7, b"\x08\x01")  # SessionLog.status = START
    return message


def _text(field: int, data: bytes) -> bytes:
    """A length-delimited protobuf field. Repeats of a message field are merged by readers, values appended."""
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    """TFRecord's masked CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


_CRC_TABLE = tuple(map(_crc_entry, range(256)))


def _publish(path: epath.Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if str(path).startswith("gs://"):  # one object, one upload: already atomic
        path.write_bytes(data)
        return
    # Not named like an event file: TensorBoard would read it.
    partial = path.parent / f".{path.suffix}.{os.getpid()}.partial"
    partial.write_bytes(data)
    os.replace(partial, path)
