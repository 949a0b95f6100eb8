#!/usr/bin/env bash
# Runs one worker on this machine; sets up its Python environment first where there is none.
#
#   ./launch_worker.sh 5              worker 5; or set TPU_WORKER_ID
#   ./launch_worker.sh 5 --verbose    further flags go to extract_activations.py
#   ./launch_worker.sh --demo         a bundled tiny model and stream, a local folder as the bucket
#   ./launch_worker.sh --setup        sets up the environment and ends: for images
#
# Settings come from environment variables; ./launch_worker.sh --help lists them once the environment is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV_DIR=${VENV_DIR:-.venv}
PINS=deploy/constraints.txt

fail() { # exit code, message
    echo "launch_worker.sh: error: $2" >&2
    exit "$1"
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    [ "${INSTALL_PYTHON:-}" = true ] ||
        fail 78 "Python 3.11 or newer is needed and was not found; install it (for example: apt-get install python3.11 python3.11-venv), or set INSTALL_PYTHON=true"
    install_python
}

install_python() { # for the user alone, with uv
    echo "installing uv and Python 3.12 with it" >&2
    {
        python3 -m pip install --quiet --user --disable-pip-version-check uv &&
            python3 -m uv python install --quiet --no-bin 3.12
    } >&2 || fail 75 "uv could not install Python 3.12; check the network and start again"
    python3 -m uv python find --managed-python 3.12
}

jax_package() {
    if [ -n "${JAX_PACKAGE:-}" ]; then
        echo "$JAX_PACKAGE"
    elif compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
        echo 'jax[tpu]'
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        echo 'jax[cuda13]'
    else
        echo 'jax'
    fi
}

is_installed() { # what is wanted
    [ -x "$VENV_DIR/bin/python" ] && [ "$(cat "$VENV_DIR/.installed" 2>/dev/null)" = "$1" ]
}

install_packages() { # what pip takes; uv, where it is there, may know less of pip's own settings
    if command -v uv >/dev/null && uv pip install --quiet --python "$VENV_DIR/bin/python" "$@" 2>/dev/null; then return; fi
    # A line a package, so that nobody takes minutes of downloads for a hang.
    "$VENV_DIR/bin/python" -m pip install --no-color --disable-pip-version-check "$@" |
        awk '/^(Collecting|Installing collected)/ { print "  " substr($0, 1, 100); fflush() }' >&2
}

# The marker is written last, so an installation that was cut off is done again; it names what was
# installed, so a changed requirements.txt or another version is installed too.
set_up_environment() {
    local python package wanted
    package=$(jax_package)
    wanted="$package $(cat requirements.txt "$PINS" | cksum)"
    if is_installed "$wanted"; then return; fi
    python=$(find_python)
    mkdir -p "$VENV_DIR" || fail 78 "cannot create $VENV_DIR; set VENV_DIR to a folder that can be written"
    exec 9>"$VENV_DIR/.lock" # several workers may start on one machine at once
    if command -v flock >/dev/null; then flock 9; fi
    if is_installed "$wanted"; then return; fi
    echo "installing $package and requirements.txt into $VENV_DIR" >&2
    "$python" -m venv "$VENV_DIR" || fail 78 "cannot create $VENV_DIR with $python; install its venv module (for example: apt-get install python3-venv)"
    install_packages "$package" -r requirements.txt -c "$PINS" ||
        fail 75 "pip could not install the requirements; check the network and start again"
    echo "$wanted" >"$VENV_DIR/.installed"
}

# In an environment of its own, so that no variable of the caller's changes what it shows.
run_demo() {
    local out=demo_output name kept=()
    mkdir -p $out/bucket
    for name in PATH HOME TMPDIR JAX_PLATFORMS XLA_FLAGS COMPILATION_CACHE_DIR; do
        [ -z "${!name:-}" ] || kept+=("$name=${!name}")
    done
    env -i "${kept[@]}" \
        MODEL_PATH=examples/demo/model DATASET_DIR=examples/demo/streams MAX_SEQ_LENGTH=1024 ROLLOUT=32 \
        OUTPUT_DIR=$out/activations CHECKPOINT_DIR=$out/checkpoints SHARD_SIZE_GB=0.008 \
        UPLOAD_TO_GCS=true GCS_BUCKET="file://$PWD/$out/bucket" \
        "$VENV_DIR/bin/python" extract_activations.py --worker_id 0
    "$VENV_DIR/bin/python" examples/demo/show.py "$out"
}

if [[ "${1:-}" =~ ^--(demo|setup)$ ]]; then
    [ $# -eq 1 ] || fail 2 "$1 takes no further arguments"
elif [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    set -- --worker_id "$@"
elif [ $# -gt 0 ] && [[ "$1" != -* ]]; then
    fail 2 "the worker id must be a whole number, got '$1'"
fi
if [[ " $* " =~ " "(-h|--help)" " ]] && [ ! -x "$VENV_DIR/bin/python" ]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    echo "All flags and variables: docs/guide.md#extract_activationspy"
    exit
fi
set_up_environment
exec 9>&- # the worker must not hold the lock
case "${1:-}" in
--setup) exit ;;
--demo)
    run_demo
    exit
    ;;
esac
# exec: SIGTERM must reach the worker itself.
exec "$VENV_DIR/bin/python" extract_activations.py "$@"
