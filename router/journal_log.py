"""The journal's log: one append for all that changed, so that it outlives the process; it never waits for a disk.

Two files take turns: one is written while the other is folded into LMDB and then emptied. A frame is a checksum, a
length and a batch of changes; reading ends at the first frame that is torn, which only a loss of power can leave.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

_NAMES = ("log-0", "log-1")
_HEADER = struct.Struct(">II")


class Change(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one request's entry holds from now on: a serialized UsageEvent, terminal where it has `ended`. `time_micros`
    is when that was known, since the epoch; 0 for one that has only begun."""

    number: int
    ended: bool
    time_micros: int
    event: bytes


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """Changes that were written together. Numbers grow by one."""

    number: int
    changes: Sequence[Change]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Batch)


class Log:
    """Both files. `number` is that of the last batch; whoever opens the log says what it was before."""

    def __init__(self, folder: Path) -> None:
        self.number = 0
        self._files = [os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in _NAMES]
        self._sizes = [os.fstat(file).st_size for file in self._files]
        self._active = 0
        self._torn = False

    def append(self, changes: Sequence[Change]) -> None:
        """Write a batch. Raises OSError, after which nothing of it is there."""
        body = _ENCODER.encode(Batch(self.number + 1, changes))
        frame = _HEADER.pack(zlib.crc32(body), len(body)) + body
        file, size_bytes = self._files[self._active], self._sizes[self._active]
        if self._torn:
            # A part of a frame that failed would end the reading before the next one.
            os.ftruncate(file, size_bytes)
        self._torn = True
        if os.pwrite(file, frame, size_bytes) != len(frame):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False
        self._sizes[self._active] += len(frame)
        self.number += 1

    def turn(self) -> None:
        """Write to the other file from now on, if that is empty."""
        if self._sizes[self._active] and not self._sizes[1 - self._active]:
            self._active = 1 - self._active
            self._torn = False

    def clear_other(self) -> None:
        """Empty the file that is not written to; from any thread, while nobody turns. Raises OSError."""
        other = 1 - self._active
        if self._sizes[other]:
            os.ftruncate(self._files[other], 0)
            self._sizes[other] = 0

    def clear(self) -> None:
        """Empty both files. Raises OSError."""
        for position, file in enumerate(self._files):
            os.ftruncate(file, 0)
            self._sizes[position] = 0

    def close(self) -> None:
        """Forget the files."""
        for file in self._files:
            os.close(file)


def read_log(folder: Path) -> list[Batch]:
    """Every whole batch of both files, in order; the files stay as they are."""
    batches: list[Batch] = []
    for name in _NAMES:
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        position = 0
        while len(content) - position > _HEADER.size:
            checksum, length = _HEADER.unpack_from(content, position)
            body = content[position + _HEADER.size : position + _HEADER.size + length]
            # Zeros, as a loss of power leaves them, have the checksum of nothing.
            if not length or len(body) != length or zlib.crc32(body) != checksum:
                break
            batches.append(_DECODER.decode(body))
            position += _HEADER.size + length
    return sorted(batches, key=lambda batch: batch.number)
