#!/usr/bin/env bash
# Sourced by the shell scripts of the top level.

run_command() { # our root, who asks, command, its arguments: replaces the shell by the command
    local root=$1 script=$2 python
    shift 2
    for python in "${VENV_DIR:-$root/.venv}/bin/python" python3 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m qwen_jax "$@"
        fi
    done
    echo "$script: error: Python 3.11 or newer was not found; install it" >&2
    exit 2
}
