"""A server as the policy: what is asked, what is tried again, where steps are cut, and searches over it."""

import concurrent.futures
import contextlib
import http.server
import json
import re
import threading
import time

import driver_case as case
import numpy as np
import pytest

from smallmath_jax.data.few_shot import EXAMPLES, cut_step, few_shot_prompt
from smallmath_jax.data.prompts import GRAMMARS
from smallmath_jax.records import Problem, Sampling, read_parts
from smallmath_jax.rollout.engine import Limits
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.tasks import synthesis
from smallmath_jax.tasks.chains import program_of
from smallmath_jax.tasks.driver import Driver
from smallmath_jax.tasks.server import (
    Client,
    ServerEngine,
    ServerError,
    ServerGone,
    ServerSettings,
)

STOPS = GRAMMARS["code_steps"].stops
GREEDY = dict(max_tokens=8, sampling=Sampling(0.7), seed=3, stop=STOPS)


@contextlib.contextmanager
def serving(answer):
    """A server on this machine; `answer(path, body, headers) -> (status, headers, body)`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, reply = answer(self.path, body, self.headers)
            data = json.dumps(reply).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def text_reply(text, **more):
    return 200, {}, {"choices": [{"text": text, "finish_reason": "stop", **more}]}


def test_what_is_asked_and_the_key_comes_from_the_environment(monkeypatch):
    seen = []

    def answer(path, body, headers):
        seen.append((path, body, headers.get("Authorization")))
        if path.endswith("chat/completions"):
            return 200, {}, {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}
        return text_reply("x", stop_reason="<end_of_step>")

    with serving(answer) as url:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        client = Client(ServerSettings(url, "m"))
        assert client.complete("hello", **GREEDY) == ("x", "<end_of_step>")
        monkeypatch.setenv("OTHER_KEY", "secret")
        chat = ServerSettings(url, "m", endpoint="chat", api_key_variable="OTHER_KEY")
        assert Client(chat).complete("hello", **GREEDY) == ("x", "length")
    (path, body, key), (chat_path, chat_body, chat_key) = seen
    assert path == "/v1/completions" and chat_path == "/v1/chat/completions"
    assert body["prompt"] == "hello" and chat_body["messages"][0]["content"] == "hello"
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (8, 0.7, 3)
    assert body["stop"] == list(STOPS) and body["model"] == "m"
    assert key is None and chat_key == "Bearer secret"


def test_a_busy_server_is_asked_again_after_longer_and_longer_pauses():
    replies = iter([(429, {"Retry-After": "7"}, {}), (503, {}, {}), (500, {}, {})])
    pauses = []

    def answer(path, body, headers):
        return next(replies, None) or text_reply("done")

    with serving(answer) as url:
        client = Client(ServerSettings(url, "m", first_pause_s=1.0), pauses.append)
        assert client.complete("hello", **GREEDY)[0] == "done"
    assert client.retries == 3 and pauses[0] == 7.0
    assert 1.0 <= pauses[1] <= 2.0 and 2.0 <= pauses[2] <= 4.0


def test_a_refusal_is_told_at_once_and_a_silent_server_after_all_tries():
    with serving(lambda *_: (400, {}, {"error": "no model m"})) as url:
        with pytest.raises(ServerError, match="HTTP 400.*no model m"):
            Client(ServerSettings(url, "m")).complete("hello", **GREEDY)
    pauses = []
    client = Client(ServerSettings(url, "m", attempts=3), pauses.append)  # it is gone now
    with pytest.raises(ServerGone, match="3 tries"):
        client.complete("hello", **GREEDY)
    assert len(pauses) == 2
    with serving(lambda *_: (200, {}, {"nothing": 1})) as url:
        with pytest.raises(ServerError, match="without choices"):
            Client(ServerSettings(url, "m")).complete("hello", **GREEDY)


def test_requests_keep_to_a_rate():
    pauses = []
    with serving(lambda *_: text_reply("x")) as url:
        client = Client(ServerSettings(url, "m", requests_per_minute=60), pauses.append)
        for _ in range(3):
            client.complete("hello", **GREEDY)
    assert len(pauses) == 2 and 0.5 < pauses[0] <= 1.0 < pauses[1] <= 2.0


def test_settings_are_checked():
    with pytest.raises(ValueError, match="must begin with http"):
        ServerSettings("localhost:8000", "m")
    with pytest.raises(ValueError, match="name of a model"):
        ServerSettings("http://x/v1", "")
    with pytest.raises(ValueError, match="known are completions, chat"):
        ServerSettings("http://x/v1", "m", endpoint="edit")


def test_where_a_step_ends():
    cut = lambda text, by="": cut_step(text, STOPS, by)
    assert cut("x=1<end_of_step>\ny=2<end_of_step>") == ("x=1<end_of_step>", "stop")
    assert cut("x=1\n", "<end_of_code>") == ("x=1\n<end_of_code>", "stop")
    assert cut("# Now print the final answer\nprint(x)\n") == (
        "# Now print the final answer\nprint(x)\n<end_of_code>",
        "stop",
    )
    assert cut("x=1\n") == ("x=1\n<end_of_step>", "stop")
    assert cut("\n<answer>\\boxed{3}") == ("\n<answer>\\boxed{3}<end_of_answer>", "stop")
    assert cut("x=1", "length") == ("x=1", "length")


def test_the_examples_of_the_prompt_are_right():
    from search_case import run_snippet

    for _, solution in EXAMPLES:
        shown = solution.partition("<output>")[2].partition("<")[0]
        result = run_snippet("", program_of(solution.partition("<output>")[0]))
        assert result.stdout.strip() == shown and f"\\boxed{{{shown}}}" in solution
    prompt = few_shot_prompt(case.problem("p"), "<code>\nx=1")
    assert prompt.endswith("Question: What is p?\n<code>\nx=1")
    with pytest.raises(ValueError, match="has pictures"):
        few_shot_prompt(Problem("p", "What?", "1", images=(b"x",)))


# ---- searches and synthesis over a server


def scripted(path, body, headers):
    """Continues the last question's solution by what stands there; the seed makes samples differ."""
    partial = body["prompt"].rpartition("Question: ")[2].partition("\n")[2]
    if body["prompt"].startswith("Here is a mathematics problem"):
        return text_reply(f"What is {body['seed'] % 3} + 4?<end_of_problem> and more")
    if "<end_of_output>" in partial:
        shown = partial.rpartition("<output>")[2].partition("<")[0]
        return text_reply(f"\n<answer>\\boxed{{{shown}}}.\n")
    if "<end_of_step>" in partial:
        return text_reply("\n# Now print the final answer\nprint(x)\n")
    value = [4, 4, 7][body["seed"] % 3]
    return text_reply(f"<code>\nx={value}\n", stop_reason="<end_of_step>")


def make_driver(engine):
    return Driver(
        case.Policy(),
        engine,
        case.HOST,
        grammar="code_steps",
        sampling=Sampling(0.7),
        max_tokens=64,
    )


def test_a_search_over_a_server_is_a_search():
    from test_driver import searched

    settings = SearchSettings(rollouts=3, candidates=4, max_errors=2)
    problems = [case.problem(f"p{number}") for number in range(5)]
    found = []
    for at_once in (1, 8):
        with serving(scripted) as url:
            client = Client(ServerSettings(url, "m", concurrent=at_once))
            with ServerEngine(client, case.TOKENS, problems, 400) as engine:
                names = [problem.id for problem in problems]
                trees, whole = searched(make_driver(engine), names, settings, at_once)
                assert whole and engine.counters()["requests"] > 20
        found.append(trees)
    assert found[0] == found[1]
    for tree in found[0].values():
        assert tree.stopped in ("exhausted", "rollouts")
        answers = {node.answer for node in tree.nodes if node.kind == "answer"}
        assert answers <= {"4", "7"} and answers
        text = "".join(node.text for node in tree.nodes[1:2])
        assert re.fullmatch(r"<code>\nx=\d\n<end_of_step>", text)


def test_a_request_that_is_refused_ends_its_search_alone():
    from test_driver import searched

    def answer(path, body, headers):
        if "What is p0?" in body["prompt"]:
            return 400, {}, {"error": "too long"}
        return scripted(path, body, headers)

    problems = [case.problem("p0"), case.problem("p1")]
    with serving(answer) as url:
        client = Client(ServerSettings(url, "m"))
        with ServerEngine(client, case.TOKENS, problems, 400) as engine:
            trees, _ = searched(make_driver(engine), ["p0", "p1"], SearchSettings(rollouts=2), 2)
    assert trees["p0"].stopped == "failed" and "too long" in trees["p0"].extra["failure"]
    assert trees["p1"].stopped != "failed"


def test_a_server_that_refuses_everyone_ends_the_run():
    with serving(lambda *_: (400, {}, {"error": "no model m"})) as url:
        client = Client(ServerSettings(url, "m"))
        for prompt in ("a", "a", "b"):
            with pytest.raises(ServerError) as told:
                client.complete(prompt, **GREEDY)
            assert told.type is ServerError
        with pytest.raises(ServerGone, match="every request is refused.*no model m"):
            client.complete("c", **GREEDY)


def test_a_chat_step_goes_on_in_a_line_of_its_own():
    """Servers strip the white space around a message."""
    problem = case.problem("p0")

    def answer(path, body, headers):
        return 200, {}, {"choices": [{"message": {"content": "x=1<end_of_step>"}}]}

    with serving(answer) as url:
        client = Client(ServerSettings(url, "m", endpoint="chat"))
        with ServerEngine(client, case.TOKENS, [problem], 400) as engine:
            found = []
            node = engine.root(case.prompt("p0"))
            for _ in range(2):
                engine.submit(node, 1, Limits(16), Sampling(), np.zeros((1, 2), np.uint32))
                rollouts = []
                while not rollouts:
                    rollouts = engine.step()
                found.append(rollouts[0][1].token_ids)
                node = engine.append(node, found[-1])
    texts = [case.TOKENS.tokenizer.decode(ids) for ids in found]
    assert texts == ["x=1<end_of_step>", "\nx=1<end_of_step>"]


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_server_that_cannot_serve_anyone_ends_the_run(status):
    from test_driver import searched

    with serving(lambda *_: (status, {}, {"error": "no key"})) as url:
        client = Client(ServerSettings(url, "m", attempts=2), lambda _: None)
        with ServerEngine(client, case.TOKENS, [case.problem("p0")], 400) as engine:
            with pytest.raises(ServerGone, match=f"HTTP {status}.*no key"):
                searched(make_driver(engine), ["p0"], SearchSettings(), 1)


def test_closing_ends_the_pauses():
    client = Client(ServerSettings("http://127.0.0.1:9/v1", "m", first_pause_s=60.0))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.complete, "hello", **GREEDY)
        while not client.retries:
            time.sleep(0.01)
        client.close()
        with pytest.raises(ServerGone, match="the run ends"):
            waiting.result(10)


class Config:
    each, solutions, agreeing, seed = 2, 6, 4, 0
    problem_tokens, solution_tokens, watchdog_s = 64, 200, 0


class Never:
    requested, exit_code = False, 0


def test_new_problems_are_kept_when_enough_solutions_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(
        synthesis, "prompts_for", lambda some, policy, config: (some, [case.prompt(some[0].id)], {})
    )
    seeds = [Problem(f"s{n}", f"What is {n}?", "1", source="x", licence="MIT") for n in range(6)]
    with serving(scripted) as url:
        client = Client(ServerSettings(url, "m"))
        with ServerEngine(client, case.TOKENS, (), 400) as engine:
            make = lambda some: synthesis.make_problems(
                make_driver(engine), client, some, tmp_path / "made", Config(), Never()
            )
            make(seeds[:3])
            before = list(read_parts(tmp_path / "made"))
            make(seeds)
    rows = list(read_parts(tmp_path / "made"))
    assert len(before) == 6 and len(rows) == 12 and rows[:6] == before
    for row in rows:
        counts = [row["answers"].count(answer) for answer in ("4", "7")]
        assert len(row["answers"]) == 6 and sum(counts) == 6
        label = "4" if counts[0] >= 4 else "7" if counts[1] >= 4 else None
        assert row["answer"] == label
        assert "end_of_problem" not in row["problem"]["problem"]
    kept, made = synthesis.keep(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert made == 12 and len(lines) == kept == len({line["problem"] for line in lines})
    assert all(line["licence"] == "MIT" and line["source"] == "synthetic from x" for line in lines)


def test_a_refused_problem_costs_itself_alone(tmp_path, monkeypatch):
    """Here every request about the second seed, and every solution of what the third one led to, is refused."""
    given = lambda some, policy, config: (some, [case.prompt(some[0].id)], {})
    monkeypatch.setattr(synthesis, "prompts_for", given)
    seeds = [Problem(f"s{n}", f"What is {n}?", "1") for n in range(4)]

    def picky(path, body, headers):
        prompt = body["prompt"]
        if "What is 1?" in prompt or ("What is 2?" not in prompt and "unlucky" in prompt):
            return 400, {}, {"error": "content filter"}
        if "What is 2?" in prompt:
            return text_reply("An unlucky problem.<end_of_problem>")
        return scripted(path, body, headers)

    with serving(picky) as url:
        client = Client(ServerSettings(url, "m"))
        with ServerEngine(client, case.TOKENS, (), 400) as engine:
            driver = make_driver(engine)
            synthesis.make_problems(driver, client, seeds, tmp_path / "made", Config(), Never())
    rows = {(row["seed_id"], row["number"]): row for row in read_parts(tmp_path / "made")}
    assert len(rows) == 8
    refused = {name for name, row in rows.items() if "content filter" in row.get("refused", "")}
    assert refused == {("s1", 0), ("s1", 1), ("s2", 0), ("s2", 1)}
    assert synthesis.keep(tmp_path)[1] == 8
    assert json.loads((tmp_path / "summary.json").read_text())["refused"] == 4
