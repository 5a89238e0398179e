"""What a version may change while the one before it still serves: migrations only add, and contracts too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.versions import previous_version
from tests.load.guard import tree_of
from tests.load.native import CHECKOUT

# A file that says in a line of comment "contracts: ..." which thing the version before does not use may take it away.
_EXCUSE = re.compile(r"^-- contracts: \S.+$", re.MULTILINE)
_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_STATEMENT = re.compile(r"\bALTER\s+TABLE\b[^;]*", re.IGNORECASE)
_PATTERNS = {
    "drops": r"\bDROP\s+(TABLE|COLUMN|VIEW|TYPE|SCHEMA|SEQUENCE|FUNCTION|AGGREGATE|INDEX|CONSTRAINT)\b",
    "renames": r"\bRENAME\b",
    "changes a type": r"\bALTER\s+(COLUMN\s+)?\w+\s+(SET\s+DATA\s+)?TYPE\b",
    "forbids null": r"\bSET\s+NOT\s+NULL\b",
}
_TAKES_AWAY = {what: re.compile(pattern, re.IGNORECASE) for what, pattern in _PATTERNS.items()}
_ADDED_COLUMN = re.compile(r"\bADD\s+COLUMN\b.*?(?=\bADD\b|\bDROP\b|\bALTER\s+COLUMN\b|$)", re.IGNORECASE | re.DOTALL)
_NOT_NULL = re.compile(r"\bNOT\s+NULL\b", re.IGNORECASE)
_GIVEN = re.compile(r"\b(DEFAULT|GENERATED)\b", re.IGNORECASE)


def taken_away(sql: str) -> list[str]:
    """What a migration does that the version before may not survive."""
    if _EXCUSE.search(sql):
        return []
    code = _COMMENT.sub("", sql)
    found = [what for what, pattern in _TAKES_AWAY.items() if pattern.search(code)]
    columns = [column for statement in _STATEMENT.finditer(code) for column in _ADDED_COLUMN.findall(statement[0])]
    if any(_NOT_NULL.search(column) and not _GIVEN.search(column) for column in columns):
        found.append("wants a value that the version before does not give")
    return found


def offences(tree: Path, previous: Path) -> list[str]:
    """Migrations that are newer than the version before and do not only add, and older ones that are not what they
    were, by name."""
    found = []
    for service in ("identity", "router", "analytics"):
        older = {file.name: file.read_bytes() for file in (previous / service / "migrations").glob("*.sql")}
        newer = {file.name: file.read_bytes() for file in (tree / service / "migrations").glob("*.sql")}
        for name in sorted(older.keys() | newer.keys()):
            if name in older:
                if newer.get(name) != older[name]:
                    found.append(f"{service}/{name}: is not what it was")
            else:
                found += [f"{service}/{name}: {what}" for what in taken_away(newer[name].decode())]
    return found


def test_migrations_since_the_version_before_only_add() -> None:
    with tree_of(previous_version()) as previous:
        assert offences(CHECKOUT, previous) == []


@pytest.mark.parametrize(
    ("sql", "what"),
    [
        ("ALTER TABLE a DROP COLUMN b;", "drops"),
        ("drop table a;", "drops"),
        ("ALTER TABLE a DROP CONSTRAINT a_pkey, ADD PRIMARY KEY (b, c);", "drops"),
        ("ALTER TABLE a RENAME COLUMN b TO c;", "renames"),
        ("ALTER TABLE a RENAME TO c;", "renames"),
        ("ALTER TABLE a ALTER COLUMN b TYPE bigint;", "changes a type"),
        ("ALTER TABLE a ALTER b SET DATA TYPE bigint;", "changes a type"),
        ("ALTER TABLE a ALTER COLUMN b SET NOT NULL;", "forbids null"),
        (
            "ALTER TABLE a ADD COLUMN b text NOT NULL, ADD COLUMN c text DEFAULT '';",
            "wants a value that the version before does not give",
        ),
    ],
)
def test_migration_that_takes_away_is_named(tmp_path: Path, sql: str, what: str) -> None:
    for service in ("identity", "router", "analytics"):
        for tree in ("new", "old"):
            (tmp_path / tree / service / "migrations").mkdir(parents=True)
    (tmp_path / "new" / "router" / "migrations" / "0099_bad.sql").write_text(f"-- Bad.\n{sql}\n")
    assert offences(tmp_path / "new", tmp_path / "old") == [f"router/0099_bad.sql: {what}"]
    excused = f"-- contracts: nothing has read it since the version before.\n{sql}\n"
    (tmp_path / "new" / "router" / "migrations" / "0099_bad.sql").write_text(excused)
    assert offences(tmp_path / "new", tmp_path / "old") == []


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE a (b text NOT NULL);",
        "ALTER TABLE a ADD COLUMN b bigint[] NOT NULL DEFAULT '{}', ADD COLUMN c text;",
        "-- Nothing is to DROP TABLE here.\nCREATE INDEX i ON a (b);",
    ],
)
def test_migration_that_adds_is_allowed(sql: str) -> None:
    assert taken_away(sql) == []


def test_contracts_since_the_version_before_only_add() -> None:
    buf = Path(sys.executable).with_name("buf")
    with tree_of(previous_version()) as previous:
        command = [str(buf), "breaking", "--against", str(previous)]
        told = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
