#!/usr/bin/env bash
# Starts every worker: on TPU VMs over gcloud, on Kubernetes, on Slurm, with SkyPilot, or on this machine.
#
#   GCS_BUCKET=your-bucket ./launch_all_workers.sh             workers 0 to NUM_WORKERS-1 on TPU VMs
#   GCS_BUCKET=your-bucket ./launch_all_workers.sh --dry_run   print the commands instead
#   ./launch_all_workers.sh --help                             engines, flags and variables; docs/fleet.md explains them
#
# Needs Python 3.11 or newer; with the packages of .venv it also checks the settings.
set -euo pipefail

case "${BASH_SOURCE[0]}" in
*/*) root=$(cd "${BASH_SOURCE[0]%/*}" && pwd) ;;
*) root=$PWD ;;
esac
# shellcheck source=qwen_jax/command.sh
. "$root/qwen_jax/command.sh"
run_command "$root" launch_all_workers.sh launch "$@"
