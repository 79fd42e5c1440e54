"""Sources as a run's config names them: short names, unique ids, renamed fields, sets that are not there."""

import json
import socket
import threading
import time

import datasets
import pytest
from huggingface_hub import constants

from configs import common
from smallmath_jax.data import converters, hub, problems
from smallmath_jax.data.problems import Rows
from smallmath_jax.tasks import evaluate
from smallmath_jax.tasks.sources import distinct_names, load_sources, name_of, training_problems


def config_of(*sources, **fields):
    config = common.base("evaluate", "tiny")
    config.eval = common.evaluation("tiny")
    config.eval.problems = sources
    config.data.fields.update(fields)
    return config


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_two_files_of_one_name_stay_two_sets(tmp_path):
    files = [
        write(tmp_path / folder / "test.jsonl", {"problem": folder, "answer": "1"})
        for folder in "ab"
    ]
    found = evaluate.load_evaluation_problems(config_of(*files))
    assert [(p.id, p.meta["set"], p.problem) for p in found] == [
        ("test/test-0", "test", "a"),
        ("test-2/test-0", "test-2", "b"),
    ]
    (tmp_path / "config.json").write_text("{}")
    assert len({p.id for p in training_problems(files, 0, config_of(), tmp_path)}) == 2


def test_names_are_short_and_distinct():
    sources = [
        "a/test.jsonl",
        "gs://b/test.parquet",
        "c/test-2.json",
        "tiny:test",
        "hf:o/x-1.5:m:test",
    ]
    names = ["test", "test-3", "test-2", "tiny:test", "x-1.5:m:test"]
    assert distinct_names(sources) == names
    assert [name_of(source) for source in sources] == ["test", "test", "test-2", *names[3:]]


def test_fields_are_renamed_in_training_and_evaluation(tmp_path):
    row = {"prompt": "1 + 1?", "problem": "no", "gold": "2", "level": "hard"}
    path = write(tmp_path / "set.jsonl", row)
    fields = {"problem": "prompt", "answer": "gold", "level": "none"}
    (tmp_path / "config.json").write_text("{}")
    for found in (
        evaluate.load_evaluation_problems(config_of(path, **fields)),
        training_problems([path], 0, config_of(**fields), tmp_path),
    ):
        assert [(p.problem, p.answer, p.level) for p in found] == [("1 + 1?", "2", None)]


@pytest.mark.parametrize("row, remedy", [
    ({"prompt": "1 + 1?", "answer": "2"}, "config.data.fields.problem"),
    ({"problem": "1 + 1?", "answer": "2", "level": "hard"}, "config.data.fields.level=none"),
])  # fmt: skip
def test_what_a_message_advises_can_be_done(tmp_path, row, remedy):
    config = config_of(write(tmp_path / "set.jsonl", row))
    with pytest.raises(ValueError, match=f"config.eval.problems: .*set.jsonl, line 1: .*{remedy}"):
        evaluate.load_evaluation_problems(config)
    name, _, value = remedy.removeprefix("config.").partition("=")
    config.update_from_flattened_dict({name: value or "prompt"})
    assert len(evaluate.load_evaluation_problems(config)) == 1


def test_rows_left_out_on_the_way_are_said(monkeypatch, capsys):
    rows = [{"problem": str(n), "answer": n if n % 2 else None} for n in range(6)]
    monkeypatch.setattr(
        converters, "hub_rows", lambda *_: Rows(6, rows.__getitem__, lambda n: f"row {n + 1}")
    )
    load_sources(["math500"], config_of(), "eval.problems")
    assert capsys.readouterr().out == "math500: 3 problems, 3 rows left out: bad_row 3\n"


def test_a_hub_out_of_reach_is_told_in_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(problems, "reachable", lambda endpoint: False)
    config = config_of("math500")
    config.data.decontaminate = ("math500",)
    path = write(tmp_path / "set.jsonl", {"problem": "1", "answer": "1"})
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=r"config.eval.problems: hf:.*cannot be reached.*give a file"
    ):
        evaluate.load_evaluation_problems(config)
    with pytest.raises(ValueError, match=r"config.data.decontaminate: hf:.*cannot be reached"):
        training_problems([path], 0, config, tmp_path)
    assert time.monotonic() - started < 5
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_whether_an_address_can_be_reached(monkeypatch):
    for name in (
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "http_proxy",
        "HTTP_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert hub.reachable(f"https://127.0.0.1:{port}")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert hub.reachable("https://hub.invalid")  # through the proxy
    assert not hub.reachable("https://hub.invalid")
    monkeypatch.delenv("https_proxy")
    assert not hub.reachable(f"https://127.0.0.1:{port}")

    released = threading.Event()

    def hang(*_, **__):
        released.wait(60)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    started = time.monotonic()
    assert not hub.reachable("https://127.0.0.1", patience_s=0.2)
    assert time.monotonic() - started < 2
    released.set()


def test_a_problem_drawn_twice_from_one_source_keeps_its_id():
    (found,) = load_sources(("tiny:train",), config_of(), "sft.data", 3000).values()
    ids = [problem.id for problem in found]
    assert len(set(ids)) < len(ids) and not any("/" in one for one in ids)
