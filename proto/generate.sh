#!/bin/sh
# Makes gen/ from proto/: Python stubs with types, a descriptor set with comments, and from it the OpenAPI document and
# its page. With --check it makes them aside and fails when the committed ones differ. Never edits proto/.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mkdir "$out/python"
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -I proto \
    --python_out="$out/python" --grpc_python_out="$out/python" \
    --mypy_out="quiet:$out/python" --mypy_grpc_out="quiet,only_async:$out/python" \
    --descriptor_set_out="$out/descriptors.binpb" --include_imports --include_source_info \
    $(find proto -name '*.proto' | sort)
touch "$out/python/aiaas/py.typed"
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$out/python" "$python" -m edge.openapi "$out/descriptors.binpb" "$out/openapi"
if [ "${1:-}" = --check ]; then
    diff -rq -x __pycache__ gen/python "$out/python" && diff -rq gen/openapi "$out/openapi" && cmp gen/descriptors.binpb "$out/descriptors.binpb" || {
        echo "gen/ differs from what proto/ makes: run 'make generate' and commit the result" >&2
        exit 1
    }
else
    rm -rf gen/python/aiaas gen/openapi
    cp -r "$out/python" "$out/openapi" "$out/descriptors.binpb" gen/
fi
