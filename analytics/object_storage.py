"""Files in object storage that speaks S3: written as a stream, linked, removed; it never knows what is in them."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Iterator
from datetime import timedelta

import obstore
from obstore.exceptions import (
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import S3Store

_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 2


class StorageRefusedError(Exception):
    """Storage answers, and does not let us: a wrong key, or a bucket that is not there."""


class StorageAwayError(Exception):
    """Storage does not answer, or cannot do it now."""


class Storage:
    """One bucket."""

    def __init__(self, url: str, bucket: str, region: str, access_key: str, secret_key: str) -> None:
        self._store = S3Store(
            bucket,
            endpoint=url,
            region=region,
            access_key_id=access_key,
            secret_access_key=secret_key,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True, "timeout": "30s", "connect_timeout": "5s"},
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
        )

    def writing(self, key: str) -> Upload:
        """A new file, there as a whole at the end of the block and not at all if that raises.

        Uploaded in parts of 8 MiB, of which two are on their way at most, so memory stays bounded. Raises
        StorageRefusedError, StorageAwayError.
        """
        return Upload(self._store, key)

    async def put(self, key: str, data: bytes) -> None:
        """A small file. Raises StorageRefusedError, StorageAwayError."""
        with _told():
            await obstore.put_async(self._store, key, data)

    async def remove(self, *keys: str) -> None:
        """See that there are no such files. Raises StorageRefusedError, StorageAwayError."""
        for key in keys:
            with _told(), contextlib.suppress(NotFoundError, FileNotFoundError):
                await obstore.delete_async(self._store, key)

    async def link(self, key: str, valid_for: timedelta) -> str:
        """An address by which anybody can fetch a file for a while."""
        with _told():
            address: str = await obstore.sign_async(self._store, "GET", key, valid_for)
        return address


class Upload:
    """A file that grows in storage."""

    def __init__(self, store: S3Store, key: str) -> None:
        self._store = store
        self._key = key
        self._writer = obstore.open_writer_async(store, key, buffer_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

    async def __aenter__(self) -> Upload:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The parts of an upload that is not ended are no file; storage drops them by its own rules.
        if kind is None:
            await self._do(self._writer.close())

    async def write(self, data: bytes) -> None:
        """Add to it; waits while too much is on its way. Raises StorageRefusedError, StorageAwayError."""
        if data:
            await self._do(self._writer.write(data))

    async def _do(self, step: Awaitable[object]) -> None:
        try:
            with _told():
                await step
        except StorageAwayError:
            # Of an upload, all errors look alike; of a question they do not. The file itself is not there yet.
            with _told(), contextlib.suppress(NotFoundError, FileNotFoundError):
                await obstore.head_async(self._store, self._key)
            raise


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError, NotFoundError, FileNotFoundError, PermissionError):
        # Without the cause: it repeats the request, whose address is signed.
        raise StorageRefusedError from None
    except (BaseError, OSError):
        raise StorageAwayError from None
