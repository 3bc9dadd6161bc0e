#!/bin/sh
# Makes .venv as requirements.lock says. Safe to run again: pip installs only what is missing or changed.
set -eu
cd "$(dirname "$0")/.."
venv=.venv

say() { printf '\033[1m%s\033[0m\n' "$*"; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo "$@"; else return 1; fi; }
apt_install() { command -v apt-get >/dev/null && as_root apt-get update -qq && as_root apt-get install -y -qq "$@" >/dev/null; }

find_python() {
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            command -v "$name"
            return
        fi
    done
    echo "Triptych needs Python 3.11 or newer; on Debian or Ubuntu: sudo apt-get install python3.11 python3.11-venv" >&2
    return 1
}

if ! [ -x "$venv/bin/pip" ]; then
    python=$(find_python)
    say "[1/3] making $venv with $("$python" --version)"
    if ! "$python" -c 'import ensurepip' 2>/dev/null && ! apt_install python3-venv; then
        echo "Python's venv module is missing: sudo apt-get install python3-venv" >&2
        exit 1
    fi
    "$python" -m venv "$venv"
fi

say "[2/3] installing what requirements.lock names (about 1 GB with torch; the first time takes minutes)"
"$venv/bin/pip" install --disable-pip-version-check --requirement requirements.lock
"$venv/bin/pip" install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
"$venv/bin/python" -c 'import aiohttp, torch, transformers, zmq' # a failed install stops here, not at the first start

say "[3/3] looking for Mooncake's system libraries"
missing=$("$venv/bin/python" deploy/system_libraries.py)
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # a list of package names
    apt_install $missing || echo "Not found and not installable from here: $missing. The mooncake transport needs them" \
        "(sudo apt-get install $missing); shm, the default on one machine, works without."
fi
touch "$venv/.installed"
