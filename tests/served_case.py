"""A tiny Hugging Face folder that writes code steps, born at random and taught for some seconds, and a server of it.

The folder is written by transformers and served by `transformers serve`, in a virtual environment of its own. It reads
the last WINDOW tokens alone, so it learns from the ends of prompts and yet answers whole few-shot prompts.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

import torch
import transformers

from smallmath_jax.data.few_shot import few_shot_prompt
from smallmath_jax.data.tiny_tokenizer import tiny_tokenizer
from smallmath_jax.records import Problem
from smallmath_jax.tasks.synthesis import END, REQUEST

WINDOW = 40  # tokens a position sees
STEPS = 200
MADE = "What is 2 + 2?"
CHAT = "<|im_end|>\n<|im_start|>assistant\n"  # what the template puts behind a user's text
COMMAND = os.environ.get(
    "SMALLMATH_SERVE",
    str(pathlib.Path(tempfile.gettempdir()) / "smallmath-serve-venv/bin/transformers"),
)


def lessons():
    """(end of a prompt, what is to follow): programs that print 4 or 7, by turns, and a new problem."""
    found = []
    for number in range(20):
        problem = Problem("p", f"What is {number} + {number % 7}?", "")
        for value in (4, 7):
            first = f"<code>\nx = {value}\n<end_of_step>"
            last = "\nprint(x)\n<end_of_code>"
            shown = f"\n<output>{value}<end_of_output>"
            answer = f"\n<answer>\\boxed{{{value}}}\n<end_of_answer>"
            path = ""
            for given, written in (("", first), ("", last), (shown, answer)):
                path += given
                found.append((few_shot_prompt(problem, path), written))
                path += written
        found += [(REQUEST.format(problem=problem.problem), MADE + END)] * 2
    return found + [(prompt + CHAT, written) for prompt, written in found]


def make_folder(folder):
    """Writes the folder; returns the last loss."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)  # as the server will
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting for each other they cost more than they save
    config = transformers.Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        sliding_window=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    model = transformers.Phi3ForCausalLM(config)
    ids, targets = batch_of(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        chosen = torch.randint(len(ids), (32,))
        logits = model(input_ids=ids[chosen]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets[chosen, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / STEPS)
    model.generation_config.do_sample = True  # the server draws by this alone, at any temperature
    model.save_pretrained(folder)
    torch.set_num_threads(threads)
    return loss.item()


def batch_of(tokenizer):
    """ids and targets [N, T], right-padded; of a prompt its last 2 x WINDOW tokens."""
    rows = []
    for prompt, written in lessons():
        end = tokenizer.encode(prompt)[-2 * WINDOW :]
        rows.append((end, tokenizer.encode(written)))
    length = max(len(end) + len(after) for end, after in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    targets = torch.full((len(rows), length), -100)
    for row, (end, after) in enumerate(rows):
        whole = torch.tensor(end + after)
        ids[row, : len(whole)] = whole
        targets[row, len(end) : len(whole)] = whole[len(end) :]
    return ids, targets


class Server:
    """`transformers serve FOLDER` on a port of its own; may be killed and started again."""

    def __init__(self, folder, log):
        self.folder, self.log = str(folder), pathlib.Path(log)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._process = None

    def start(self):
        assert pathlib.Path(COMMAND).exists(), (
            f"{COMMAND} is missing; the install step stands in .ci/run: a virtual environment with torch and "
            "transformers[serving], its bin/transformers named by SMALLMATH_SERVE"
        )
        words = [COMMAND, "serve", self.folder, "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--device", "cpu", "--dtype", "float32"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                words, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait(self, seconds=600):
        """Until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self._process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                health = self.url.removesuffix("/v1") + "/health"
                with urllib.request.urlopen(health, timeout=5) as reply:
                    return reply.status
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text())

    def kill(self):
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def requests(self):
        """How many it has been asked, by its own log."""
        return self.log.read_text().count("[Request received]") if self.log.exists() else 0
