#!/usr/bin/env bash
# Asks every host to save a checkpoint and stop (SIGTERM). The same tpu/run.sh continues. tpu/stop.sh --delete also
# deletes the TPU; what is on gs:// stays.
set -euo pipefail
. "$(dirname "$0")/common.sh"

on_hosts all 'touch smallmath/stop; pkill -TERM -f "[p]ython run.py" || echo "nothing runs on $(hostname)"'
if [ "${1:-}" = --delete ]; then
  gcloud compute tpus tpu-vm delete "$NAME" "${WHERE[@]}"
fi
