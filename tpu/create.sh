#!/usr/bin/env bash
# Creates a TPU VM, or all hosts of a pod slice. Add SPOT=1 for a preemptible one: runs continue where they stopped.
set -euo pipefail
. "$(dirname "$0")/common.sh"

case "$TYPE" in
  v4-*) image=tpu-ubuntu2204-base ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  *) echo "TYPE=$TYPE is unknown here; known: v4-N, v5litepod-N, v5p-N, v6e-N" >&2; exit 2 ;;
esac
gcloud compute tpus tpu-vm create "$NAME" "${WHERE[@]}" --accelerator-type "$TYPE" --version "$image" ${SPOT:+--spot}
gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" --format 'value(state,acceleratorType)'
