#!/usr/bin/env bash
# Puts this working tree on every host and installs it into ~/smallmath/.venv. Run it again after changing code.
# The hosts' own Python is 3.10; uv brings 3.11.
set -euo pipefail
. "$(dirname "$0")/common.sh"

archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$(dirname "$0")/.." archive --format tar.gz --output "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$NAME:smallmath.tar.gz" "${WHERE[@]}" --worker all
on_hosts all '
  set -e
  mkdir -p smallmath && tar -xzf smallmath.tar.gz -C smallmath && cd smallmath
  command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [ -d .venv ] || ~/.local/bin/uv venv --python 3.11
  ~/.local/bin/uv pip install --quiet -e ".[tpu]"
  .venv/bin/python -c "import jax; print(jax.__version__, \"installed\")"'
