#!/bin/sh
# Makes gen/ from proto/: Python stubs with types, TypeScript stubs, a descriptor set with comments, and from it the
# OpenAPI document, its page and the commands of the command line; then docs/reference/ from that and from the code, and
# deploy/dashboards/json/. With
# --check it makes them aside and fails when the committed ones differ. Never edits proto/.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mkdir "$out/python" "$out/typescript" "$out/cli"
PYTHON="$python" deploy/local/npm_install.sh sdk/typescript
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -I proto \
    --python_out="$out/python" --grpc_python_out="$out/python" \
    --mypy_out="quiet:$out/python" --mypy_grpc_out="quiet,only_async:$out/python" \
    --plugin=protoc-gen-es=proto/protoc-gen-es --es_out="$out/typescript" --es_opt=target=ts,import_extension=js \
    --descriptor_set_out="$out/descriptors.binpb" --include_imports --include_source_info \
    $(find proto -name '*.proto' | sort)
touch "$out/python/aiaas/py.typed"
export PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$out/python"
"$python" -m edge.openapi "$out/descriptors.binpb" "$out/openapi"
"$python" -m cli.contracts "$out/descriptors.binpb" "$out/cli/commands.json"
"$python" -m deploy.reference "$out/descriptors.binpb" "$out/reference"
"$python" -m deploy.dashboards "$out/dashboards"
if [ "${1:-}" = --check ]; then
    diff -rq -x __pycache__ gen/python "$out/python" && diff -rq gen/typescript "$out/typescript" &&
        diff -rq gen/openapi "$out/openapi" && diff -rq gen/cli "$out/cli" &&
        cmp gen/descriptors.binpb "$out/descriptors.binpb" && diff -rq docs/reference "$out/reference" &&
        diff -rq deploy/dashboards/json "$out/dashboards" || {
        echo "gen/, docs/reference/ or deploy/dashboards/json/ differs from what proto/ and the code make: run 'make generate' and commit the result" >&2
        exit 1
    }
else
    rm -rf gen/python/aiaas gen/typescript gen/openapi gen/cli docs/reference deploy/dashboards/json
    cp -r "$out/python" "$out/typescript" "$out/openapi" "$out/cli" "$out/descriptors.binpb" gen/
    cp -r "$out/reference" docs/
    cp -r "$out/dashboards" deploy/dashboards/json
fi
