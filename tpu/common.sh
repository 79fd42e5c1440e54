# Read by every script here: which TPU, where. Set these in the environment, or edit this file.
#   NAME=smallmath ZONE=us-west4-a TYPE=v5litepod-16 tpu/create.sh
# TYPE is Google's name: v4-8, v4-32, v5litepod-16 (called v5e-16 in this project), v5p-8, v6e-8.
: "${NAME:=smallmath}"
: "${ZONE:?set ZONE to the zone of your TPU quota, for example us-west4-a}"
: "${TYPE:=v5litepod-16}"
: "${PROJECT:=$(gcloud config get-value project 2>/dev/null)}"
WHERE=(--zone "$ZONE" --project "$PROJECT")

# on_hosts WORKER COMMAND: runs a command on one host (its number) or on all of them.
on_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker "$1" --command "$2"
}
