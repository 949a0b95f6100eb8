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

case "${BASH_SOURCE[0]}" in
*/*) root=$(cd "${BASH_SOURCE[0]%/*}" && pwd) ;;
*) root=$PWD ;;
esac
# shellcheck source=qwen_jax/command.sh
. "$root/qwen_jax/command.sh"
run_command "$root" check_all_workers.sh workers "$@"
