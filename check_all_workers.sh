#!/usr/bin/env bash
# Progress of every worker, from the checkpoint files in CHECKPOINT_DIR (./checkpoints).
#
#   ./check_all_workers.sh       workers 0 to NUM_WORKERS-1 (32)
#   ./check_all_workers.sh 64    workers 0 to 63
set -euo pipefail

CHECKPOINT_DIR=${CHECKPOINT_DIR:-./checkpoints}
NUM_WORKERS=${1:-${NUM_WORKERS:-32}}

if [[ "${1:-}" = -h || "${1:-}" = --help ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi

if ! [[ "$NUM_WORKERS" =~ ^[1-9][0-9]*$ ]]; then
    echo "check_all_workers.sh: error: the number of workers must be a whole number above 0, got '$NUM_WORKERS'" >&2
    exit 2
fi
command -v jq >/dev/null || {
    echo "check_all_workers.sh: error: jq was not found; install it (for example: apt-get install jq)" >&2
    exit 2
}

# Only whole numbers and one plain word get through: the shell's arithmetic would run what is in a string.
fields='def count: if type == "number" and . >= 0 and . < 1e15 and . == floor then floor else error end;
    def word: if test("\\A[a-z_]+\\z") then . else error end;
    if length == 1 then .[0] else error end |
    "\(.total_samples_processed | count) \(.total_shards | count) \(.status // "in_progress" | word)"'
samples_total=0 shards_total=0 completed=0 started=0
for ((i = 0; i < NUM_WORKERS; i++)); do
    file="$CHECKPOINT_DIR/checkpoint_worker_$i.json"
    if [ ! -f "$file" ]; then
        echo "Worker $i: Not started"
    elif line=$(jq -ers "$fields" "$file" 2>/dev/null); then
        read -r samples shards status <<<"$line"
        echo "Worker $i: $samples samples, $shards shards, $status"
        samples_total=$((samples_total + samples)) shards_total=$((shards_total + shards)) started=$((started + 1))
        if [ "$status" = completed ]; then completed=$((completed + 1)); fi
    else
        echo "Worker $i: checkpoint unreadable ($file)"
    fi
done
echo "Total: $samples_total samples, $shards_total shards; $completed of $NUM_WORKERS workers completed, $started started"
