#!/usr/bin/env bash
# Sourced by tests/run and tests/check, in the checkout: makes their environment, .venv-test.

venv=.venv-test
python=python3
for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
install() { # folder of the environment, constraints, requirements files
    local venv=$1 constraints=$2 wanted
    shift 2
    wanted=$(cat "$constraints" "$@" | cksum)
    if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ]; then return; fi
    echo "installing $* into $venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "--constraint=$constraints" \
        "${@/#/--requirement=}"
    echo "$wanted" >"$venv/.installed"
}
install "$venv" deploy/constraints.txt requirements.txt tests/requirements.txt
