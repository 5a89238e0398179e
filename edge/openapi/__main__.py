"""Writes openapi.json and index.html: `python -m edge.openapi DESCRIPTORS FOLDER`; it serves nothing."""

import json
import sys
from pathlib import Path

from edge.openapi.contracts import read_contracts
from edge.openapi.document import document
from edge.openapi.page import page


def write(descriptors: Path, folder: Path) -> None:
    """Make both files from a descriptor set with comments."""
    described = document(read_contracts(descriptors.read_bytes()))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(described, indent=1, ensure_ascii=False)
    (folder / "openapi.json").write_text(text + "\n", encoding="utf-8")
    (folder / "index.html").write_text(page(described), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
