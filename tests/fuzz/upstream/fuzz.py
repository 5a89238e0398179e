"""Feeds the client for engines whatever atheris comes up with, until something breaks; the tests run what it found.

pip install atheris                                       Linux, CPython up to 3.13
python -m tests.fuzz.upstream.fuzz -max_total_time=600    libFuzzer's options; new findings go to `found`
python -m tests.fuzz.upstream.fuzz -merge=1               moves into `corpus`, which is committed, what covers more
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris  # type: ignore[import-untyped]  # it has no types

with atheris.instrument_imports(include=["router.http1"]):
    from tests.fuzz.upstream.target import check

from tests.doubles.recorded_answers import ALL

_HERE = Path(__file__).parent
_SEED_BYTES = 4096
# Pieces of so many bytes, so that a seed is split in the middle of everything.
_SEED_SPLIT = b"\x03"


def main() -> None:
    """Begin with the recorded answers and the corpus."""
    found, corpus = _HERE / "found", _HERE / "corpus"
    found.mkdir(exist_ok=True)
    for number, recorded in enumerate(ALL):
        if len(recorded.raw) <= _SEED_BYTES:
            (found / f"recorded-{number}").write_bytes(_SEED_SPLIT + recorded.raw)
    # libFuzzer writes to the first folder.
    folders = [corpus, found] if "-merge=1" in sys.argv else [found, corpus]
    # As a merge runs it once more, by a shell.
    program = f"{sys.executable} -m tests.fuzz.upstream.fuzz"
    atheris.Setup([program, f"-artifact_prefix={found}/", *sys.argv[1:], *map(str, folders)], check)
    atheris.Fuzz()


main()
