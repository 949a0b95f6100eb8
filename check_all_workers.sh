#!/usr/bin/env bash
# Progress of every worker, from the checkpoint files in CHECKPOINT_DIR (./checkpoints) or from the bucket.
#
#   ./check_all_workers.sh                       workers 0 to NUM_WORKERS-1 (32)
#   ./check_all_workers.sh 64                    workers 0 to 63
#   ./check_all_workers.sh --bucket gs://BUCKET --html fleet.html
#   ./check_all_workers.sh --help                all flags
#
# Needs Python 3.11 or newer; --bucket also the packages of .venv (./launch_worker.sh makes it).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
for python in "${VENV_DIR:-$root/.venv}/bin/python" python3 python3.13 python3.12 python3.11; do
    if is_new_enough "$python"; then
        PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m qwen_jax workers "$@"
    fi
done
echo "check_all_workers.sh: error: Python 3.11 or newer was not found; install it" >&2
exit 2
