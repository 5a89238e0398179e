"""Rows as CSV and Parquet: what is written is read back, and no spreadsheet computes with it."""

import csv
import gzip
import io
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiaas.analytics.v1.export_service_pb2 import ExportCompression, ExportFormat, ExportGranularity
from analytics.export_files import file_for, harmless
from analytics.exports import SUM_COLUMNS, Row, Wanted
from analytics.usage import Filter

NOW = datetime(2026, 11, 20, tzinfo=UTC)
ROW: Row = (NOW, "key_a", "user_a", "", "smollm2", "OUTCOME_SUCCEEDED", 3, 30, 12, 15, 75)


def wanted(format_: str = "CSV", compression: str = "UNSPECIFIED") -> Wanted:
    return Wanted(
        ExportGranularity.EXPORT_GRANULARITY_DAILY,
        ExportFormat.Value(f"EXPORT_FORMAT_{format_}"),
        ExportCompression.Value(f"EXPORT_COMPRESSION_{compression}"),
        NOW,
        NOW,
        Filter(),
    )


def written(of: Wanted, *batches: list[Row]) -> bytes:
    file = file_for(of)
    return b"".join([*map(file.add, batches), file.finish()])


@pytest.mark.parametrize(
    ("cell", "is_formula"),
    [
        ("=1+1", True),
        ("+1", True),
        ("-1", True),
        ("@SUM(A1)", True),
        ("\t=1", True),
        ("\r=1", True),
        ("\uff1d1", True),
        ("smollm2", False),
        ("a=b", False),
        ("", False),
    ],
)
def test_formula_begins_with_an_apostrophe(cell: str, is_formula: bool) -> None:
    assert harmless(cell) == (f"'{cell}" if is_formula else cell)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=5, max_size=5))
def test_csv_holds_any_text_as_one_cell(texts: list[str]) -> None:
    row = (NOW, *texts, 1, 2, 3, 4, 5)
    header, read = csv.reader(io.StringIO(written(wanted(), [row]).decode(), newline=""))
    assert header == list(SUM_COLUMNS)
    assert read == ["2026-11-20T00:00:00Z", *map(harmless, texts), "1", "2", "3", "4", "5"]


def test_lines_end_as_the_rfc_says() -> None:
    assert written(wanted(), [ROW]).count(b"\r\n") == 2


def test_compressed_csv_is_the_same_file() -> None:
    plain = written(wanted(), [ROW], [ROW])
    assert gzip.decompress(written(wanted(compression="GZIP"), [ROW], [ROW])) == plain
    packed = pa.CompressedInputStream(pa.BufferReader(written(wanted(compression="ZSTD"), [ROW], [ROW])), "zstd")
    assert packed.read() == plain


@pytest.mark.parametrize("compression", ["UNSPECIFIED", "NONE", "GZIP", "ZSTD"])
def test_parquet_reads_back(compression: str) -> None:
    table = pq.read_table(pa.BufferReader(written(wanted("PARQUET", compression), [ROW], [ROW, ROW])))
    assert table.num_rows == 3
    assert tuple(table.to_pylist()[2].values()) == ROW
    assert not any(field.nullable for field in table.schema)


def test_export_without_rows_has_a_header() -> None:
    assert written(wanted()).decode().strip() == ",".join(SUM_COLUMNS)
    assert pq.read_table(pa.BufferReader(written(wanted("PARQUET")))).num_rows == 0
