#!/usr/bin/env bash
# Starts every worker: on TPU VMs over gcloud, on Kubernetes, with SkyPilot, or on this machine.
#
#   GCS_BUCKET=your-bucket ./launch_all_workers.sh             workers 0 to NUM_WORKERS-1 on TPU VMs
#   GCS_BUCKET=your-bucket ./launch_all_workers.sh --dry_run   print the commands instead
#   ./launch_all_workers.sh --help                             engines, flags and variables; docs/fleet.md explains them
#
# Needs Python 3.11 or newer and no packages.
set -euo pipefail

case "${BASH_SOURCE[0]}" in
*/*) root=$(cd "${BASH_SOURCE[0]%/*}" && pwd) ;;
*) root=$PWD ;;
esac
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
for python in "${VENV_DIR:-$root/.venv}/bin/python" python3 python3.13 python3.12 python3.11; do
    if is_new_enough "$python"; then
        PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m qwen_jax launch "$@"
    fi
done
echo "launch_all_workers.sh: error: Python 3.11 or newer was not found; install it" >&2
exit 2
