"""Rows into bytes, CSV or Parquet, a batch at a time; it keeps no more than one batch, and never stores anything."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from aiaas.analytics.v1.export_service_pb2 import ExportCompression, ExportFormat
from analytics.exports import Kind, Row, Wanted

_CODECS = {
    ExportCompression.EXPORT_COMPRESSION_GZIP: "gzip",
    ExportCompression.EXPORT_COMPRESSION_ZSTD: "zstd",
}
_TYPES = {
    Kind.TEXT: pa.string(),
    Kind.NUMBER: pa.int64(),
    Kind.TIME: pa.timestamp("us", tz="UTC"),
    Kind.FLAG: pa.bool_(),
}
# What spreadsheets take for the beginning of a formula (OWASP, CSV injection), in full width as well.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


class File(Protocol):
    """A file that grows. Both methods give the bytes that are new."""

    def add(self, rows: Sequence[Row]) -> bytes:
        """Take rows; what they become may come later."""

    def finish(self) -> bytes:
        """Nothing is added any more."""


def file_for(wanted: Wanted) -> File:
    """An empty file of the form that is wanted."""
    codec = _CODECS.get(wanted.compression)
    if wanted.format == ExportFormat.EXPORT_FORMAT_PARQUET:
        usual = wanted.compression == ExportCompression.EXPORT_COMPRESSION_UNSPECIFIED
        return _ParquetFile(wanted.columns, "zstd" if usual else codec or "none")
    return _CsvFile(wanted.columns, codec)


class _Sink(io.RawIOBase):
    """Takes bytes until they are fetched."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


class _CsvFile:
    """RFC 4180, in UTF-8, with a header."""

    def __init__(self, columns: Mapping[str, Kind], codec: str | None) -> None:
        self._texts = [position for position, kind in enumerate(columns.values()) if kind is Kind.TEXT]
        self._times = [position for position, kind in enumerate(columns.values()) if kind is Kind.TIME]
        self._flags = [position for position, kind in enumerate(columns.values()) if kind is Kind.FLAG]
        self._header: Sequence[str] | None = tuple(columns)
        self._sink = _Sink()
        self._stream = pa.CompressedOutputStream(pa.PythonFile(self._sink, "w"), codec) if codec else None

    def add(self, rows: Sequence[Row]) -> bytes:
        """Take rows."""
        text = io.StringIO(newline="")
        # The end of a line is that of RFC 4180 whatever the machine's is.
        writer = csv.writer(text, lineterminator="\r\n")
        if self._header is not None:
            writer.writerow(self._header)
            self._header = None
        writer.writerows(map(self._cells, rows))
        return self._write(text.getvalue().encode())

    def finish(self) -> bytes:
        """The end of the compression; the header, if there was no row."""
        begun = self.add(()) if self._header is not None else b""
        if self._stream is None:
            return begun
        self._stream.close()
        return begun + self._sink.take()

    def _write(self, data: bytes) -> bytes:
        if self._stream is None:
            return data
        self._stream.write(data)
        return self._sink.take()

    def _cells(self, row: Row) -> list[Any]:
        cells = list(row)
        for position in self._texts:
            cells[position] = harmless(cells[position])
        for position in self._times:
            cells[position] = _moment(cells[position])
        for position in self._flags:
            cells[position] = "true" if cells[position] else "false"
        return cells


class _ParquetFile:
    """Apache Parquet, one row group for each batch."""

    def __init__(self, columns: Mapping[str, Kind], codec: str) -> None:
        self._schema = pa.schema([pa.field(name, _TYPES[kind], nullable=False) for name, kind in columns.items()])
        self._sink = _Sink()
        self._writer = pq.ParquetWriter(pa.PythonFile(self._sink, "w"), self._schema, compression=codec)

    def add(self, rows: Sequence[Row]) -> bytes:
        """Take rows."""
        if rows:
            arrays = [
                pa.array(values, field.type)
                for values, field in zip(zip(*rows, strict=True), self._schema, strict=True)
            ]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        return self._sink.take()

    def finish(self) -> bytes:
        """The footer, without which nobody can read it."""
        self._writer.close()
        return self._sink.take()


def harmless(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: one that would be begins with an apostrophe instead."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _moment(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
