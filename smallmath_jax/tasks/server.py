"""Any OpenAI-compatible server as a policy: it stands where an Engine stands, so searches run over it unchanged.

Requests go out from threads, as many at a time as the config allows; a server that is busy or down (429, 5xx, a lost
connection) is asked again after a growing pause, or after the one it names. A request that is refused ends the search
that asked; a server that stays away, or knows neither key nor model, ends the run, which goes on with the same command.
The key comes from the environment alone.
"""

import concurrent.futures
import dataclasses
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from smallmath_jax.data.few_shot import EXAMPLES, cut_step, few_shot_prompt
from smallmath_jax.data.prompts import GRAMMARS
from smallmath_jax.data.tokens import Tokens, decode, encode_after
from smallmath_jax.records import Problem, Prompt, Sampling
from smallmath_jax.rollout.engine import Limits, Rollout
from smallmath_jax.tasks import runs

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
OF_THE_REQUEST = (
    400,
    413,
    422,
    500,
)  # what one request is to blame for, and not the server or its address
ENDPOINTS = ("completions", "chat")
REFUSED = 3  # different prompts: a server that has refused so many and answered none refuses all


class ServerError(OSError):
    """The server refused this request; the message says what it said."""


class ServerGone(ServerError):
    """The server stayed unreachable or busy, or knows no such key, model or endpoint: every request would fail."""


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Where a server is and how it may be asked. `api_key_variable` names the environment variable with the key."""

    base_url: str  # with the version: http://localhost:8000/v1
    model: str
    endpoint: str = "completions"  # completions: text goes on | chat: one user message
    concurrent: int = 16
    requests_per_minute: int = 0  # 0: as many as come back
    timeout_s: float = 300.0
    attempts: int = 10  # with these pauses: about four minutes
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    api_key_variable: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise ValueError(
                f"bootstrap.endpoint={self.endpoint!r}: known are {', '.join(ENDPOINTS)}"
            )
        if not self.model:
            raise ValueError(
                f"base_url={self.base_url!r} needs the name of a model there: bootstrap.model (synthesis: server.model)"
            )
        if urllib.parse.urlsplit(self.base_url).scheme not in ("http", "https"):
            raise ValueError(
                f"bootstrap.base_url={self.base_url!r} must begin with http:// or https://"
            )
        if self.concurrent < 1 or self.attempts < 1:
            raise ValueError("bootstrap.concurrent and bootstrap.attempts must be at least 1")


class Client:
    """Asks a server for one completion at a time, from any thread."""

    def __init__(self, settings: ServerSettings, sleep: Callable[[float], Any] | None = None):
        self._closed = threading.Event()
        self.settings, self._sleep = settings, sleep or self._closed.wait
        self._lock, self._next = threading.Lock(), 0.0
        self._answered, self._refused, self._told = False, set(), False
        self.retries = 0

    def complete(
        self, text: str, *, max_tokens: int, sampling: Sampling, seed: int, stop: Sequence[str]
    ) -> tuple[str, str]:
        """(what follows `text`, why it ended: a stop string where the server tells it, "length" or "").

        Raises ServerError when the server refuses, ServerGone when it is not to be reached in `attempts` tries.
        """
        body: dict[str, Any] = {
            "model": self.settings.model,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "stop": list(stop)[:4],
        }
        chat = self.settings.endpoint == "chat"
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        try:
            answer = self._ask("/chat/completions" if chat else "/completions", body)
        except ServerGone:
            raise
        except ServerError as error:
            self._refused.add(text)
            if not self._answered and len(self._refused) >= REFUSED:
                raise ServerGone(f"every request is refused: {error}") from error
            raise
        self._answered = True
        try:
            choice = answer["choices"][0]
            found = choice["message"]["content"] if chat else choice["text"]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{self.settings.base_url}: an answer without choices: {json.dumps(answer)[:300]}"
            ) from error
        told = choice.get("stop_reason")
        reason = "length" if choice.get("finish_reason") == "length" else told
        return found or "", reason if isinstance(reason, str) else ""

    def close(self) -> None:
        """Ends all pauses; who waited in one gets ServerGone."""
        self._closed.set()

    def _ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        settings = self.settings
        request = urllib.request.Request(
            settings.base_url.rstrip("/") + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **self._authorization()},
        )
        kind = ServerGone
        for attempt in range(settings.attempts):
            self._wait_for_turn()
            if self._closed.is_set():
                raise ServerGone(f"{settings.base_url}{path}: given up, the run ends")
            try:
                with urllib.request.urlopen(request, timeout=settings.timeout_s) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                kind = ServerError if error.code in OF_THE_REQUEST else ServerGone
                if error.code not in RETRIED:
                    raise kind(f"{settings.base_url}{path}: {said}") from error
                named = error.headers.get("Retry-After")
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                said, named, kind = f"{type(error).__name__}: {error}", None, ServerGone
            self.retries += 1
            self._tell(
                f"{settings.base_url}{path}: {said}; trying again, {settings.attempts} times in all"
            )
            if attempt + 1 < settings.attempts:
                self._sleep(self._pause(attempt, named))
        raise kind(f"{settings.base_url}{path}: {settings.attempts} tries, the last: {said}")

    def _tell(self, said: str) -> None:
        """Why nothing seems to happen: once, however many requests wait."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            runs.say(said)

    def _authorization(self) -> dict[str, str]:
        key = os.environ.get(self.settings.api_key_variable)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _pause(self, attempt: int, named: str | None) -> float:
        """Twice as long each time, the second half of it random; at least what the server named."""
        longest = self.settings.longest_pause_s
        pause = min(self.settings.first_pause_s * 2**attempt, longest)
        pause *= 0.5 + 0.5 * random.random()
        try:
            return max(pause, min(float(named or 0), 10 * longest))
        except ValueError:  # a date
            return pause

    def _wait_for_turn(self) -> None:
        if not self.settings.requests_per_minute:
            return
        with self._lock:
            now = time.monotonic()
            wait = max(self._next - now, 0.0)
            self._next = max(self._next, now) + 60.0 / self.settings.requests_per_minute
        if wait:
            self._sleep(wait)


def settings_of(settings: Any) -> ServerSettings:
    """ServerSettings of the fields of a config section that it knows."""
    known = {field.name for field in dataclasses.fields(ServerSettings)}
    return ServerSettings(**{name: settings[name] for name in known if name in settings})


class ServerEngine:
    """What a search asks of an Engine, answered by a server: root, append, submit, step, prune, counters.

    Ids are those of `tokens`, our tokenizer, in both directions: what the server writes is encoded once and travels as
    ids from then on. Log-probs are unknown and 0. Use as a context manager.
    """

    version = 0

    def __init__(
        self,
        client: Client,
        tokens: Tokens,
        problems: Sequence[Problem],
        cache_length: int,
        shots: int = len(EXAMPLES),
    ):
        self.client, self._tokens, self._shots = client, tokens, shots
        self.slots, self.cache_length = client.settings.concurrent, cache_length
        self._problems = {problem.id: problem for problem in problems}
        self._stops = GRAMMARS["code_steps"].stops
        self._paths: dict[int, tuple[Problem, tuple[int, ...]]] = {}
        self._parents: dict[int, int | None] = {}
        self._next = 0
        # ticket -> (node, what its answer must begin with, the answer to come)
        self._flights: dict[int, tuple[int, str, concurrent.futures.Future]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(self.slots, "server")
        self._started, self._decoded, self._requests = time.perf_counter(), 0, 0

    def __enter__(self) -> "ServerEngine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.close()
        self._pool.shutdown(cancel_futures=True)

    def know(self, problem: Problem) -> None:
        """Makes a problem that was not there at the start one that `root` can be asked for."""
        self._problems[problem.id] = problem

    def root(self, prompt: Prompt) -> int:
        return self._add(None, self._problems[prompt.problem_id], ())

    def append(self, node: int, token_ids: Sequence[int]) -> int:
        problem, path = self._paths[node]
        return self._add(node, problem, path + tuple(int(token) for token in token_ids))

    def _add(self, parent: int | None, problem: Problem, path: tuple[int, ...]) -> int:
        node, self._next = self._next, self._next + 1
        self._paths[node], self._parents[node] = (problem, path), parent
        return node

    def prune(self, node: int) -> None:
        gone = {node}
        for one in sorted(self._paths):
            if one in gone or self._parents[one] in gone:
                gone.add(one)
                del self._paths[one], self._parents[one]
        for ticket in [ticket for ticket, (at, *_) in self._flights.items() if at in gone]:
            self._flights.pop(ticket)[-1].cancel()

    def submit(
        self, node: int, n: int, limits: Limits, sampling: Sampling, keys: np.ndarray
    ) -> list[int]:
        problem, path = self._paths[node]
        text = few_shot_prompt(problem, decode(self._tokens, path), self._shots)
        tickets = []
        for key in np.asarray(keys):
            ticket, self._next = self._next, self._next + 1
            # Chat servers strip an answer's white space: a step that goes on begins on a line of its own
            lead = "\n" if path and self.client.settings.endpoint == "chat" else ""
            future = self._pool.submit(
                self.client.complete,
                text,
                max_tokens=limits.max_tokens,
                sampling=sampling,
                seed=int(key[0]) & 0x7FFFFFFF,
                stop=self._stops,
            )
            self._flights[ticket] = (node, lead, future)
            tickets.append(ticket)
        return tickets

    def step(self) -> list[tuple[int, Rollout | Exception]]:
        """What has come back; waits a little for the first. A request that was refused comes back as its exception.

        Raises ServerGone when the server is.
        """
        futures = {future: ticket for ticket, (*_, future) in self._flights.items()}
        done, _ = concurrent.futures.wait(
            futures, 0.05, return_when=concurrent.futures.FIRST_COMPLETED
        )
        found: list[tuple[int, Rollout | Exception]] = []
        for ticket in sorted(futures[future] for future in done):
            _, lead, future = self._flights.pop(ticket)
            self._requests += 1
            error = future.exception()
            if isinstance(error, ServerGone):
                raise error
            found.append((ticket, error or self._rollout(lead, *future.result())))
        return found

    def _rollout(self, lead: str, text: str, stopped_by: str) -> Rollout:
        step, reason = cut_step(lead + text.removeprefix(lead), self._stops, stopped_by)
        ids = encode_after(self._tokens, step).astype(np.int32)
        self._decoded += len(ids)
        return Rollout(ids, np.zeros(len(ids), np.float32), reason, self.version)

    def counters(self) -> dict[str, float]:
        return {
            "decoded_tokens": self._decoded,
            "decode_steps": 0,
            "decode_seconds": time.perf_counter() - self._started,
            "prefill_seconds": 0.0,
            "requests": self._requests,
            "retries": self.client.retries,
        }
