#!/usr/bin/env bash
# Starts workers 0 to NUM_WORKERS-1, each on its own TPU VM, over gcloud ssh.
#
#   GCS_BUCKET=your-bucket ./launch_all_workers.sh             start them all
#   GCS_BUCKET=your-bucket ./launch_all_workers.sh --dry_run   print the commands instead
#
# Variables: NUM_WORKERS (32), ZONE (us-central2-b), NAME_PATTERN (tpu-worker-{}; {} is the worker id),
# REMOTE_DIR (qwen: the checkout on each VM, relative to the home folder). The worker's own variables
# (MODEL_PATH, BATCH_SIZE, ...) are passed on where they are set. A worker's log is REMOTE_DIR/logs/worker_N.log.
set -euo pipefail

NUM_WORKERS=${NUM_WORKERS:-32}
ZONE=${ZONE:-us-central2-b}
NAME_PATTERN=${NAME_PATTERN:-tpu-worker-{\}}
REMOTE_DIR=${REMOTE_DIR:-qwen}
PASSED_ON=(GCS_BUCKET GCS_PREFIX MODEL_PATH MODEL_REVISION DATASET_DIR OUTPUT_DIR CHECKPOINT_DIR BATCH_SIZE
    SHARD_SIZE_GB MAX_SEQ_LENGTH MAX_SAMPLES MAX_BAD_RECORDS LAYERS_TO_EXTRACT ACTIVATION_TYPE INCLUDE_EMBEDDING
    INCLUDE_ANSWER KEEP_TOKENS SKIP_FIRST SKIP_SPECIAL_TOKENS DTYPE
    ACTIVATION_DTYPE ATTENTION MODEL_PARALLEL LOOKAHEAD PROMPT_FORMAT CHAT_TEMPLATE OVERLONG
    DELETE_LOCAL_AFTER_UPLOAD COMPILATION_CACHE_DIR GCS_RETRY_BUDGET_S VERBOSE)

fail() {
    echo "launch_all_workers.sh: error: $1" >&2
    exit 2
}

remote_command() { # worker id
    local name line
    # ls: says so where the script is missing; what runs in the background could not.
    line="cd $(printf %q "$REMOTE_DIR") && ls launch_worker.sh > /dev/null && mkdir -p logs && export TPU_WORKER_ID=$1 UPLOAD_TO_GCS=true"
    for name in "${PASSED_ON[@]}"; do
        if [ -n "${!name:-}" ]; then line+=" $name=$(printf %q "${!name}")"; fi
    done
    # >>: a second start must not empty the log of a worker that runs.
    echo "$line && { nohup ./launch_worker.sh >> logs/worker_$1.log 2>&1 < /dev/null & }"
}

dry_run=false
case "$*" in
--dry_run | --dry-run) dry_run=true ;;
'') ;;
-h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
*) fail "unknown arguments '$*'; the only flag is --dry_run" ;;
esac
[ -n "${GCS_BUCKET:-}" ] || fail "set GCS_BUCKET to the bucket that the workers upload to"
[[ "$NUM_WORKERS" =~ ^[1-9][0-9]*$ ]] || fail "NUM_WORKERS must be a whole number above 0, got '$NUM_WORKERS'"
[[ "$NAME_PATTERN" == *'{}'* ]] || fail "NAME_PATTERN must contain {} for the worker id, got '$NAME_PATTERN'"
$dry_run || command -v gcloud >/dev/null || fail "gcloud was not found; install the Google Cloud CLI"

failed=()
for ((i = 0; i < NUM_WORKERS; i++)); do
    command=(gcloud compute tpus tpu-vm ssh "${NAME_PATTERN//\{\}/$i}" --zone "$ZONE" --command "$(remote_command "$i")")
    if $dry_run; then
        printf '%q ' "${command[@]}"
        echo
        continue
    fi
    echo "starting worker $i on ${NAME_PATTERN//\{\}/$i}"
    "${command[@]}" </dev/null || failed+=("$i")
done
$dry_run && exit
echo "$((NUM_WORKERS - ${#failed[@]})) of $NUM_WORKERS workers started"
if [ ${#failed[@]} -gt 0 ]; then
    echo "not started: ${failed[*]}; mend what gcloud reported above and run this again (running workers refuse a second start)" >&2
    exit 1
fi
