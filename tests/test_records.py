"""Records on disk: a part is there whole or not at all, and a key is a pure function of what it names."""

import errno
import json
import os

import numpy as np
import pytest
from etils import epath

from smallmath_jax.records import draw_key, read_parts, to_json, write_part, write_text


def test_a_part_is_published_whole_or_not_at_all(tmp_path, monkeypatch):
    write_part(tmp_path, "1.jsonl", [{"step": 1}])
    path_type = type(epath.Path(tmp_path))
    whole = path_type.write_text

    def killed(path, text):
        whole(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(path_type, "write_text", killed)
    for name in ("1.jsonl", "2.jsonl"):  # one to be replaced, one new
        with pytest.raises(KeyboardInterrupt):
            write_part(tmp_path, name, [{"step": 1, "more": 2}, {"step": 2}])
    assert list(read_parts(tmp_path)) == [{"step": 1}]


def test_a_torn_line_is_named(tmp_path):
    (tmp_path / "3.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(ValueError, match="3.jsonl, line 2: not a JSON object"):
        list(read_parts(tmp_path))
    (tmp_path / "3.jsonl").write_bytes('{"step": 1}\n{"text": "é'.encode()[:-1])  # in a character
    with pytest.raises(ValueError, match="3.jsonl, line 2: not a JSON object"):
        list(read_parts(tmp_path))
    assert list(read_parts(tmp_path / "nowhere")) == []


def test_a_line_ends_only_where_the_writer_ended_it(tmp_path):
    rows = [{"text": "".join(map(chr, range(0x100))) + "\u2028\u2029"}, {"text": "\r\n"}]
    write_part(tmp_path, "1.jsonl", rows)
    assert list(read_parts(tmp_path)) == rows


def test_a_full_disk_is_named_and_not_kept_full(tmp_path, monkeypatch):
    path_type = type(epath.Path(tmp_path))
    whole = path_type.write_text

    def full(path, text):
        whole(path, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(path_type, "write_text", full)
    with pytest.raises(OSError, match="No space left on device.*1.jsonl") as found:
        write_part(tmp_path, "1.jsonl", [{"step": 1}])
    assert found.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_pair_can_be_written_and_read_back(tmp_path):
    rows = [{"text": "\ud83d"}, {"text": "a \ude00 b é 😀 \\ud83d"}]
    write_part(tmp_path, "1.jsonl", rows)
    assert list(read_parts(tmp_path)) == rows
    write_text(tmp_path / "page.html", "é \ud83d")
    assert (tmp_path / "page.html").read_bytes() == "é \\ud83d".encode()
    plain = {"text": "é 😀 \\ud83d \x7f"}
    assert to_json(plain) == json.dumps(plain, ensure_ascii=False)


def test_keys_are_fixed_across_machines_and_releases():
    assert draw_key(0, "grpo", "p", 3, 1).tolist() == [2185938975, 611766394]
    keys = {tuple(draw_key(*parts)) for parts in ((0, 1), (1, 0), (0, "1 "), ("01",), (0, 1, 0))}
    assert len(keys) == 5
    assert to_json({"n": np.float32(0.5), "ids": np.arange(2)}) == '{"n": 0.5, "ids": [0, 1]}'
