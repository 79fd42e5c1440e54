"""Round 1 and problem synthesis by a real OpenAI-compatible server: `transformers serve` with a tiny folder.

The virtual environment it needs is made by `.ci/run --full`; SMALLMATH_SERVE names its `transformers` command.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import served_case
from PIL import Image

from smallmath_jax.data.few_shot import few_shot_prompt
from smallmath_jax.data.prompts import GRAMMARS
from smallmath_jax.data.tokens import add_step_tokens, decode, load_tokens
from smallmath_jax.records import Problem, Sampling, read_parts
from smallmath_jax.tasks.server import Client, ServerError, ServerSettings

pytestmark = pytest.mark.full
ROOT = pathlib.Path(__file__).parent.parent
KEY = "sk-a-secret-that-no-file-may-hold"
STOPS = GRAMMARS["code_steps"].stops
SHORT = (
    "--config.bootstrap.solutions=0",
    "--config.evolve.rounds=1",
    "--config.evolve.rollouts=(3,)",
    "--config.evolve.candidates=(4,)",
    "--config.evolve.guidance=('terminal',)",
    "--config.evolve.max_errors=(1,)",
    "--config.evolve.per_round=0",
    "--config.sft.steps=2",
    "--config.ppm.steps=2",
    "--config.ppm.held_out=0.0",
    "--config.eval.limit=2",
    "--config.eval.samples=1",
    "--config.eval.final_samples=1",
    "--config.eval.final_search_problems=1",
    "--config.eval.search.rollouts=1",
    "--config.eval.search.candidates=2",
    "--config.engine.slots=8",
    "--config.export=False",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("served") / "model"
    served_case.make_folder(place)
    return place


@pytest.fixture
def server(folder, tmp_path):
    one = served_case.Server(folder, tmp_path / "server.log")
    one.start()
    one.wait()
    yield one
    one.kill()


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Eight whose answers the model gives now and then, and one with a picture."""
    place = tmp_path_factory.mktemp("problems")
    Image.new("RGB", (56, 56), (200, 30, 30)).save(place / "red.png")
    rows = [
        {
            "id": f"p{n}",
            "problem": f"What is {n} + {(4, 7)[n % 2] - n}?",
            "answer": str((4, 7)[n % 2]),
        }
        for n in range(8)
    ]
    rows.append({"id": "seen", "problem": "How many?", "answer": "4", "image": "red.png"})
    path = place / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Run:
    """The command in a session of its own, so that a kill takes its children along."""

    def __init__(self, log, *words):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "SERVED_KEY": KEY}
        self.log = open(log, "ab")
        self.process = subprocess.Popen(
            [sys.executable, "run.py", *words],
            cwd=ROOT,
            env=environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def end(self, number=None, seconds=900):
        """Its exit code; `number`: the signal it is sent first."""
        if number == signal.SIGKILL:
            os.killpg(self.process.pid, number)
        elif number is not None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            self.log.close()

    def until(self, reached, seconds=600):
        end = time.monotonic() + seconds
        while not reached():
            assert self.process.poll() is None, pathlib.Path(self.log.name).read_text()
            assert time.monotonic() < end, pathlib.Path(self.log.name).read_text()
            time.sleep(0.05)


def evolve(tmp_path, folder, problems, *more):
    words = ["--config=configs/evolve.py:tiny", f"--workdir={tmp_path / 'run'}"]
    words += [f"--config.problems=('{problems}',)", f"--config.bootstrap.model={folder}"]
    return Run(tmp_path / "client.log", *words, *SHORT, *more)


def trees_of(root):
    return list(read_parts(root / "round_1" / "search" / "trees"))


def check_round(root):
    """The search's trees are programs of the model, in the policy's own ids, and the rest of the round followed."""
    rows = trees_of(root)
    assert sorted(row["problem_id"] for row in rows) == [f"p{n}" for n in range(8)]
    tokens = add_step_tokens(load_tokens("tiny"), GRAMMARS["code_steps"].marks)
    values = set()
    for row in rows:
        assert row["stopped"] in ("exhausted", "rollouts"), row["extra"]
        for node in row["nodes"][1:]:
            assert decode(tokens, node["token_ids"]) == node["text"]
            found = re.fullmatch(r"<code>\nx = ([47])\n<end_of_step>", node["text"])
            values |= set(found[1]) if found else set()
    assert values == {"4", "7"}
    answers = [node["answer"] for row in rows for node in row["nodes"] if node["kind"] == "answer"]
    assert len(answers) >= 8 and set(answers) >= {"4", "7"}
    selected = json.loads((root / "round_1" / "select" / "done.json").read_text())
    assert len(selected["solved_ids"]) >= 4 and selected["pairs_kept"] >= 1
    for stage in ("sft", "ppm", "evaluate"):
        assert (root / "round_1" / stage / "done.json").exists()


def test_round_one_goes_on_when_client_and_server_are_killed(server, folder, problems, tmp_path):
    more = (
        f"--config.bootstrap.base_url={server.url}",
        "--config.bootstrap.concurrent=4",
        "--config.bootstrap.requests_per_minute=240",
        "--config.bootstrap.api_key_variable=SERVED_KEY",
        "--config.in_flight=2",
    )
    root = tmp_path / "run"
    start = lambda: evolve(tmp_path, folder, problems, *more)
    asked = lambda count: lambda: server.requests() >= count
    one = start()
    one.until(asked(60))
    assert one.end(signal.SIGTERM) == 143  # what is finished is saved
    saved = trees_of(root)
    assert 1 <= len(saved) < 8
    two = start()
    before = server.requests()
    two.until(asked(before + 12))
    two.end(signal.SIGKILL)
    three = start()
    before = server.requests()
    three.until(asked(before + 12))
    server.kill()
    time.sleep(5)  # the client meets nobody
    assert three.process.poll() is None
    before, began = server.requests(), time.monotonic()
    server.start()
    three.until(asked(before + 20))
    assert server.requests() - before <= 4 * (time.monotonic() - began) + 4  # the rate limit
    assert three.end() == 0, (tmp_path / "client.log").read_text()
    check_round(root)
    rows = {row["problem_id"]: row for row in trees_of(root)}
    assert [rows[row["problem_id"]] for row in saved] == saved
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20 and not any(KEY.encode() in path.read_bytes() for path in written)


def test_a_local_folder_searches_round_one(folder, problems, tmp_path):
    """The same folder, run here: what the server wrote and what our engine draws are the same programs."""
    assert evolve(tmp_path, folder, problems).end() == 0, (tmp_path / "client.log").read_text()
    assert "1 problems with pictures wait" in (tmp_path / "client.log").read_text()
    check_round(tmp_path / "run")


def test_new_problems_by_the_chat_endpoint(server, folder, problems, tmp_path):
    words = ["--config=configs/synthesis.py:tiny", f"--workdir={tmp_path / 'run'}"]
    words += [f"--config.problems=('{problems}',)", f"--config.server.base_url={server.url}"]
    words += [f"--config.server.model={folder}", "--config.limit=0"]
    words += ["--config.solutions=5", "--config.agreeing=3"]
    words += ["--config.server.concurrent=2", "--config.server.requests_per_minute=240"]
    first = Run(tmp_path / "client.log", *words)
    first.until(lambda: server.requests() >= 40)
    assert first.end(signal.SIGTERM) == 143
    made = list(read_parts(tmp_path / "run" / "made"))
    assert Run(tmp_path / "client.log", *words).end() == 0, (tmp_path / "client.log").read_text()
    rows = list(read_parts(tmp_path / "run" / "made"))
    assert rows[: len(made)] == made and len(rows) == 8
    assert sorted(row["seed_id"] for row in rows) == [f"p{n}" for n in range(8)]
    right = [row for row in rows if row["problem"]["problem"] == served_case.MADE]
    assert len(right) >= 2
    for row in right:
        assert row["answer"] in ("4", "7") and row["answers"].count(row["answer"]) >= 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "problems.jsonl").open()]
    assert served_case.MADE in [line["problem"] for line in lines]
    assert all(line["answer"] in ("4", "7") for line in lines)


def test_both_endpoints_answer_and_a_wrong_model_is_told(server, folder):
    problem = Problem("p", "What is 1 + 3?", "4")
    path = "<code>\nx = 4\n<end_of_step>"
    for endpoint in ("completions", "chat"):
        client = Client(ServerSettings(server.url, str(folder), endpoint=endpoint))
        ask = lambda text, seed, client=client: client.complete(
            text, max_tokens=48, sampling=Sampling(1.0), seed=seed, stop=STOPS
        )[0]
        drawn = [ask(few_shot_prompt(problem), seed) for seed in range(8)]
        assert set(drawn) == {f"<code>\nx = {value}\n<end_of_step>" for value in (4, 7)}
        assert drawn == [ask(few_shot_prompt(problem), seed) for seed in range(8)]  # by the seed
        assert ask(few_shot_prompt(problem, path), 0).strip() == "print(x)\n<end_of_code>"
    wrong = Client(ServerSettings(server.url, "another"))
    with pytest.raises(ServerError, match="HTTP 400.*pinned to"):
        wrong.complete("x", max_tokens=1, sampling=Sampling(1.0), seed=0, stop=())
