"""The TPU scripts against a gcloud that runs each remote command here: no TPU, no network."""

import os
import pathlib
import subprocess
import time

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "tpu"
GCLOUD = """#!/bin/bash
echo "$@" >> "$HOME/calls"
while [ $# -gt 0 ]; do
  if [ "$1" = --command ]; then cd "$HOME" && bash -c "$2"; exit; fi
  shift
done
"""
PYTHON = """#!/bin/bash
echo "attempt $@"
[ -e third ] && exit 0
[ -e second ] && { touch third; exit 1; }
touch second; exit 86
"""


@pytest.fixture
def host(tmp_path):
    """A home folder with a fake gcloud, and a smallmath checkout whose python fails twice, then succeeds."""
    for path, text in (("bin/gcloud", GCLOUD), ("smallmath/.venv/bin/python", PYTHON)):
        file = tmp_path / path
        file.parent.mkdir(parents=True)
        file.write_text(text)
        file.chmod(0o755)
    return tmp_path


def run(host, script, *words, **variables):
    environment = {"HOME": str(host), "PATH": f"{host}/bin:{os.environ['PATH']}", "PAUSE": "0"}
    environment |= {"ZONE": "here", "PROJECT": "mine", **variables}
    return subprocess.run(
        [FOLDER / script, *words], env=environment, capture_output=True, text=True, timeout=60
    )


def log_of(host, lines):
    log = host / "smallmath" / "run.log"
    for _ in range(200):
        if log.exists() and len(log.read_text().splitlines()) >= lines:
            break
        time.sleep(0.05)
    return log.read_text().splitlines()


def test_a_run_that_ends_badly_is_started_again_with_the_same_words(host):
    words = ["--config=configs/grpo.py", "--config.eval.problems=('a b',)"]
    assert run(host, "run.sh", *words).returncode == 0
    attempt = f"attempt run.py {' '.join(words)}"
    again = "ended with {}; starting again in 0 s"
    assert log_of(host, 5) == [attempt, again.format(86), attempt, again.format(1), attempt]


def test_a_stopped_run_is_not_started_again(host):
    python = host / "smallmath/.venv/bin/python"
    python.write_text("#!/bin/bash\ntouch stop\nexit 1\n")
    assert run(host, "run.sh", "--config=configs/sft.py").returncode == 0
    time.sleep(0.5)
    assert log_of(host, 0) == []


@pytest.mark.parametrize(
    "kind, image",
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
    ],
)
def test_a_machine_is_created_with_its_image(host, kind, image):
    assert run(host, "create.sh", TYPE=kind, SPOT="1").returncode == 0
    call = (host / "calls").read_text().splitlines()[0]
    assert f"--accelerator-type {kind} --version {image} --spot" in call


def test_bad_words_are_explained(host):
    done = run(host, "create.sh", TYPE="h100")
    assert done.returncode == 2 and "TYPE=h100 is unknown here" in done.stderr
    done = run(host, "run.sh")
    assert done.returncode == 2 and "usage: tpu/run.sh" in done.stderr
    done = run(host, "watch.sh", ZONE="")
    assert done.returncode != 0 and "set ZONE" in done.stderr


def test_every_script_parses():
    for script in sorted(FOLDER.glob("*.sh")):
        subprocess.run(["bash", "-n", script], check=True)
