#!/usr/bin/env bash
# Shows what host 0 prints (WORKER=3 tpu/watch.sh: another host), after one line a host on whether it still runs.
set -euo pipefail
. "$(dirname "$0")/common.sh"

on_hosts all 'echo "$(hostname): $(pgrep -fc "run[.]py" || true) process(es), last line: $(tail -n 1 smallmath/run.log)"'
on_hosts "${WORKER:-0}" 'tail -n 50 -f smallmath/run.log'
