#!/bin/sh
# Makes Go stubs of the contracts below an import path of your own: sdk/go/generate.sh IMPORT_PATH FOLDER
# Needs protoc-gen-go and protoc-gen-go-grpc on the PATH, and the tests' Python environment for protoc. They are not kept
# in gen/: their import paths belong to the module that holds them.
set -eu
path=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
cd "$(dirname "$0")/../.."
files=$(cd proto && find aiaas -name '*.proto' | sort)
options=
for file in $files; do
    package=$(dirname "$file")
    # aiaas/identity/v1 is the package identityv1.
    name=$(basename "$(dirname "$package")")$(basename "$package")
    options="$options --go_opt=M$file=$path/$package;$name --go-grpc_opt=M$file=$path/$package;$name"
done
# shellcheck disable=SC2086 # lists of options and files
"${PYTHON:-.venv/bin/python}" -m grpc_tools.protoc -I proto --go_out="$folder" --go-grpc_out="$folder" $options $files
