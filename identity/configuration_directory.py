"""Watches a directory of documents, one file an organization, and has each applied; it never judges what they say.

Git stays the source of truth: what people change otherwise is brought back with the next look, unless the organization
is paused. git-sync and Argo CD keep such directories; where the path goes through a folder that is named after a
commit, that is the revision.
"""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

from identity import fields
from identity.audit import Audit
from identity.configuration_documents import DOCUMENT_BYTES
from identity.configurations import Configuration, Configurations, Plan, Source
from mesh.errors import PlatformError, Reason

logger = logging.getLogger(__name__)

LOOK_S = 30.0
"""So often every document is compared with its organization."""

_SUFFIX = ".yaml"
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


class ConfigurationDirectory:
    """The documents of all organizations: `<organization id>.yaml`; without a path there are none."""

    def __init__(self, configurations: Configurations, audit: Audit, path: str) -> None:
        self._configurations = configurations
        self._audit = audit
        self._path = Path(path) if path else None

    async def sync(self, organization_id: str) -> tuple[Plan, Configuration]:
        """Apply one organization's document as it is now. Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION where
        there is none."""
        text = await asyncio.to_thread(self._read, f"{organization_id}{_SUFFIX}")
        if text is None:
            await self._configurations.get(organization_id)
            raise PlatformError(
                Reason.FAILED_PRECONDITION,
                description="There is no document of the organization in a watched directory.",
            )
        return await self._configurations.sync(organization_id, text, self._source(organization_id))

    async def run(self, stop: asyncio.Event) -> None:
        """Look regularly, until `stop` is set."""
        while self._path is not None and not stop.is_set():
            for name in await asyncio.to_thread(self._names):
                organization_id = name.removesuffix(_SUFFIX)
                try:
                    async with self._audit.own("ConfigurationDirectory", organization_id):
                        plan, _ = await self.sync(organization_id)
                except PlatformError as error:
                    logger.warning("the document %s could not be applied: %s", name, error.reason.value)
                except Exception:
                    # One document's fault must not keep the others from being applied.
                    logger.exception("the document %s could not be applied", name)
                else:
                    if plan.problems:
                        logger.warning("the document %s has %d problems", name, len(plan.problems))
                    elif plan.effective:
                        logger.info("the document %s was looked at: %d changes", name, len(plan.effective))
            try:
                async with asyncio.timeout(LOOK_S):
                    await stop.wait()
            except TimeoutError:
                pass

    def _names(self) -> list[str]:
        assert self._path is not None  # noqa: S101
        try:
            found = sorted(path.name for path in self._path.iterdir() if path.suffix == _SUFFIX)
        except OSError as error:
            logger.warning("the directory of documents cannot be read: %s", error.strerror)
            return []
        return [name for name in found if fields.is_id(name.removesuffix(_SUFFIX))]

    def _read(self, name: str) -> str | None:
        if self._path is None:
            return None
        try:
            with (self._path / name).open(encoding="utf-8", errors="replace") as file:
                # One character more says that it is too long.
                return file.read(DOCUMENT_BYTES + 1)
        except OSError:
            return None

    def _source(self, organization_id: str) -> Source:
        assert self._path is not None  # noqa: S101
        path = self._path / f"{organization_id}{_SUFFIX}"
        commits = [part for part in path.resolve().parts if _COMMIT.fullmatch(part)]
        return Source(f"{organization_id}{_SUFFIX}", commits[-1] if commits else "")
