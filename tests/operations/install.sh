#!/bin/sh
# Installs the real parts that tests/operations run against: Debian's packages, where they are not there yet.
set -eu

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 1; fi; }
there() { command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ]; }

missing=
there nginx || missing="$missing nginx-light"
there docker-compose || missing="$missing docker-compose"
there systemd-analyze || missing="$missing systemd"
there strace || missing="$missing strace"
there prometheus || missing="$missing prometheus"
there chromium || missing="$missing chromium fonts-dejavu-core"
[ -n "$missing" ] || exit 0
echo "installing$missing"
# shellcheck disable=SC2086 # a list of package names
if ! { command -v apt-get >/dev/null && as_root apt-get update -qq &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null; }; then
    echo "not installable from here:$missing; on Debian or Ubuntu: sudo apt-get install$missing" >&2
    exit 1
fi
