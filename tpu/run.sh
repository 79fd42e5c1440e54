#!/usr/bin/env bash
# Starts the same command on every host, in the background, and leaves it running when the connection drops:
#   tpu/run.sh --config=configs/grpo.py --workdir=gs://BUCKET/run
# A host that crashes or hangs ends all of them (the watchdog exits with 86); each then starts the command again, up
# to RESTARTS times, and the run continues from its last checkpoint. Exit 0 and a stop asked for by tpu/stop.sh end it.
# LIBTPU_INIT_ARGS: weights are gathered whole, not in windows, as in the compiled programs of docs/tpu.md.
set -euo pipefail
. "$(dirname "$0")/common.sh"

[ $# -gt 0 ] || { echo "usage: tpu/run.sh --config=configs/TASK.py --workdir=gs://BUCKET/run [--config.FIELD=VALUE]" >&2; exit 2; }
words=$(printf '%q ' "$@")
flags=${LIBTPU_INIT_ARGS---xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000}
loop="export LIBTPU_INIT_ARGS='$flags'; rm -f stop; for start in \$(seq 0 ${RESTARTS:-20}); do .venv/bin/python run.py $words; code=\$?; \
[ \$code = 0 ] && exit; [ -e stop ] && exit; \
echo \"ended with \$code; starting again in ${PAUSE:-30} s\"; sleep ${PAUSE:-30}; done"
on_hosts all "cd smallmath && nohup setsid bash -c $(printf '%q' "$loop") >> run.log 2>&1 < /dev/null & echo started on \$(hostname)"
echo "tpu/watch.sh shows its output"
