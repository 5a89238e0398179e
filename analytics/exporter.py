"""Writes the exports that wait into object storage, and sees that files go when their time is over.

Any number of processes may; each export is written by one of them, and by another when that one dies. Rows are read,
written and uploaded a few thousand at a time, so that memory does not grow with an export. Metrics:
`aiaas_analytics_exports_total{outcome}`, `aiaas_analytics_export_bytes_total`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from contextlib import AsyncExitStack, aclosing
from datetime import datetime, timedelta

from aiaas.analytics.v1.export_service_pb2 import ExportCompression, ExportFormat, ExportGranularity
from analytics import metrics
from analytics.export_files import file_for
from analytics.export_store import ExportStore, HoursGoneError
from analytics.exports import KEPT, StoredExport, Wanted, month_before, run_after
from analytics.object_storage import Storage, StorageAwayError, StorageRefusedError
from analytics.usage import Filter
from mesh.clock import Clock
from mesh.errors import PlatformError

logger = logging.getLogger(__name__)

LIMIT_S = 1800.0
"""Seconds that one export may take."""

_INTERVAL_S = 5.0
_SIGN_OF_LIFE_S = 1.0
_ATTEMPTS = 5
_PAUSE = timedelta(seconds=10)


class LostError(Exception):
    """Somebody cancelled the export, or took it to be lost: it is not ours to write any more."""


class Exporter:
    """Works until it is cancelled."""

    def __init__(self, store: ExportStore, storage: Storage, clock: Clock) -> None:
        self._store = store
        self._storage = storage
        self._clock = clock
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """There is an export to write."""
        self._woken.set()

    async def run(self) -> None:
        """Write one export after the other, make those that schedules want, and remove files that are too old."""
        while True:
            self._woken.clear()
            try:
                while await self.work():
                    pass
            except PlatformError as error:
                logger.warning("exports wait: %s", error.reason.value)
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def work(self) -> bool:
        """One round; returns whether there may be more to do. Raises PlatformError(UNAVAILABLE)."""
        await self._schedule()
        await self._clear()
        export = await self._store.claim(self._clock.now())
        if export is None:
            return False
        await self._write(export)
        return True

    async def _write(self, export: StoredExport) -> None:
        try:
            async with asyncio.timeout(LIMIT_S):
                await self._upload(export)
        except LostError:
            logger.info("export %s is not written any more", export.export_id)
            return
        except StorageRefusedError:
            await self._fail(export, "storage_refused")
        except HoursGoneError:
            await self._fail(export, "hours_gone")
        except TimeoutError:
            await self._fail(export, "too_slow")
        except (StorageAwayError, PlatformError) as error:
            if export.attempts >= _ATTEMPTS:
                await self._fail(export, "storage_unavailable")
                return
            logger.warning("export %s is tried again: %s", export.export_id, type(error).__name__)
            await self._store.postpone(export, self._clock.now() + _PAUSE * 2 ** (export.attempts - 1))
        except Exception:
            # One export that cannot be written, for whatever reason, must not end the process that counts usage.
            logger.exception("export %s broke", export.export_id)
            await self._fail(export, "internal")
        else:
            metrics.EXPORTS.labels("succeeded").inc()

    async def _fail(self, export: StoredExport, reason: str) -> None:
        logger.error("export %s failed: %s", export.export_id, reason)
        metrics.EXPORTS.labels(reason).inc()
        await self._store.fail(export, reason, self._clock.now())

    async def _upload(self, export: StoredExport) -> None:
        """Raises LostError, HoursGoneError, StorageRefusedError, StorageAwayError, PlatformError(UNAVAILABLE)."""
        wanted, file = export.wanted, file_for(export.wanted)
        digest, rows, size_bytes = hashlib.sha256(), 0, 0
        told_at = self._clock.monotonic()
        async with AsyncExitStack() as held:
            upload = await held.enter_async_context(self._storage.writing(export.object_key))
            batches = await held.enter_async_context(aclosing(self._store.batches(export)))
            async for batch in batches:
                data = await asyncio.to_thread(file.add, batch)
                await upload.write(data)
                digest.update(data)
                rows, size_bytes = rows + len(batch), size_bytes + len(data)
                if self._clock.monotonic() >= told_at + _SIGN_OF_LIFE_S:
                    told_at = self._clock.monotonic()
                    await self._keep(export, _percent(wanted, batch[-1][0]), rows)
            data = await asyncio.to_thread(file.finish)
            await upload.write(data)
            digest.update(data)
            size_bytes += len(data)
            # Until the last part is there it is still somebody's.
            await self._keep(export, 99, rows)
        manifest = _manifest(export, rows, size_bytes, digest.hexdigest())
        await self._storage.put(export.manifest_key, manifest)
        now = self._clock.now()
        if not await self._store.succeed(export, rows, size_bytes, digest.digest(), now, now + KEPT):
            raise LostError
        metrics.EXPORT_BYTES.inc(size_bytes)

    async def _keep(self, export: StoredExport, progress_percent: int, rows: int) -> None:
        if not await self._store.keep(export, self._clock.now(), progress_percent, rows):
            raise LostError

    async def _clear(self) -> None:
        """Remove what is too old, and what cancelled exports left."""
        for export in await self._store.expire(self._clock.now()):
            try:
                await self._storage.remove(export.object_key, export.manifest_key)
            except (StorageRefusedError, StorageAwayError) as error:
                # It comes up again in a minute.
                logger.warning("the file of export %s stays for now: %s", export.export_id, type(error).__name__)
            else:
                await self._store.cleared(export)

    async def _schedule(self) -> None:
        """Make the exports of months that are over; of each in its turn, where several were missed."""
        now = self._clock.now()
        for schedule, run_time in await self._store.due_schedules(now):
            start, end = month_before(run_time)
            wanted = Wanted(schedule.granularity, schedule.format, schedule.compression, start, end, Filter())
            try:
                # By this name it is made once, whoever comes first.
                made = await self._store.create(schedule.organization_id, wanted, "", f"month-{start:%Y-%m}", now)
            except PlatformError as error:
                logger.warning("the monthly export of %s waits: %s", schedule.organization_id, error.reason.value)
                continue
            await self._store.ran(schedule, made.export_id, run_after(run_time))


def _percent(wanted: Wanted, reached: datetime) -> int:
    """How much of the range lies behind."""
    return max(0, min(99, int(100 * (reached - wanted.start_time) / (wanted.end_time - wanted.start_time))))


def _manifest(export: StoredExport, rows: int, size_bytes: int, sha256: str) -> bytes:
    wanted = export.wanted
    told = {
        "export_id": export.export_id,
        "organization_id": export.organization_id,
        "object_key": export.object_key,
        "granularity": ExportGranularity.Name(wanted.granularity),
        "format": ExportFormat.Name(wanted.format),
        "compression": ExportCompression.Name(wanted.compression),
        "start_time": wanted.start_time.isoformat(),
        "end_time": wanted.end_time.isoformat(),
        "columns": {name: kind.value for name, kind in wanted.columns.items()},
        "rows": rows,
        "size_bytes": size_bytes,
        "sha256": sha256,
    }
    return json.dumps(told, indent=2).encode()
