"""What `make check` holds changes of the contracts to: clients that were made from the published ones go on working."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aiaas.type.v1 import options_pb2

ROOT = Path(options_pb2.__file__).parents[5]
BUF = Path(sys.executable).with_name("buf")
MODELS = "proto/aiaas/router/v1/model_service.proto"


def judged(folder: Path, file: str, old: str, new: str) -> subprocess.CompletedProcess[str]:
    """What buf says of the contracts with one change, against those of this tree."""
    shutil.copytree(ROOT / "proto", folder / "proto")
    shutil.copy(ROOT / "buf.yaml", folder)
    text = (ROOT / file).read_text()
    assert text.count(old) == 1
    (folder / file).write_text(text.replace(old, new))
    published = folder / "published"
    shutil.copytree(ROOT / "proto", published / "proto")
    shutil.copy(ROOT / "buf.yaml", published)
    command = [str(BUF), "breaking", "--against", str(published)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  string owner = 3;", "", 'field "3" with name "owner" on message "Model" was deleted'),
        ("  string owner = 3;", "  string owner = 30;", "was deleted"),
        ("  string owner = 3;", "  int64 owner = 3;", "changed type"),
        ("  string owner = 3;", "  repeated string owner = 3;", "changed cardinality"),
        ("  string owner = 3;", "  string offered_by = 3;", "changed name"),
        ("rpc DeleteModel(", "rpc RemoveModel(", 'RPC "DeleteModel" on service "ModelService" was deleted'),
    ],
)
def test_change_that_breaks_clients_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    told = judged(tmp_path, MODELS, old, new)
    assert told.returncode != 0
    assert re.search(words, told.stdout)


def test_addition_is_allowed(tmp_path: Path) -> None:
    added = "  string owner = 3;\n  // More.\n  string more = 90;"
    told = judged(tmp_path, MODELS, "  string owner = 3;", added)
    assert (told.returncode, told.stdout) == (0, "")


def test_check_holds_the_contracts_to_the_published_ones() -> None:
    check = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert "buf breaking --against '.git#ref=$(CONTRACT_BASE)'" in check
