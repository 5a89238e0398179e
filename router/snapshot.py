"""What this router knows of its callers, its models and its backends, kept on disk for its next start; it never decides
whether that still holds.

A router that starts while identity and PostgreSQL are away goes on with it: with the registry until it can be read, and
with principals, and with organizations that had no budgets, for as long as what nobody can confirm may be used. Keys
are digests of credentials, and no value is a secret. What is forgotten is forgotten on disk at once, and what was
revoked while the router was down is forgotten when the log of revocations is read on, from where it was left.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import shutil
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import msgspec
from google.protobuf.message import DecodeError

from aiaas.type.v1 import principal_pb2
from mesh.auth import CachedAuthenticator, Confirmed, Principal
from mesh.clock import Clock
from router.backends import Registry, RegistryContent
from router.budgets import Budgets

logger = logging.getLogger(__name__)

_INTERVAL_S = 2.0
_MAP_BYTES = 1 << 30
_REGISTRY, _UNBOUND, _REVISION = b"registry", b"unbound", b"revision"
_CONFIRMED_AT = struct.Struct(">d")
# The form of what is written; what an older router wrote is not read.
_VERSION = 1


class _Unbound(msgspec.Struct, frozen=True, array_like=True):
    """Organizations without budgets, and when identity was there last, in seconds since the epoch."""

    organization_ids: list[str]
    confirmed_at: float


class RouterSnapshot:
    """The folder is this router's alone. What cannot be read or written is logged and removed; nothing waits for it.

    `unconfirmed_s` is for how long organizations count as without budgets while nobody can tell.
    """

    def __init__(
        self,
        folder: Path,
        authenticator: CachedAuthenticator,
        registry: Registry,
        budgets: Budgets,
        clock: Clock,
        unconfirmed_s: float,
    ) -> None:
        self._folder = folder
        self._authenticator = authenticator
        self._registry = registry
        self._budgets = budgets
        self._clock = clock
        self._unconfirmed_s = unconfirmed_s
        self._env: lmdb.Environment | None = None
        # One thread, so that nothing is written after the end and everything in its order.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        # What is on disk.
        self._registry_revision: int | None = None
        self._revision: int | None = None

    def restore(self) -> None:
        """Have the authenticator and the registry begin with what was known last, before anybody asks them."""
        try:
            self._restore(self._opened())
        except (lmdb.Error, OSError) as error:
            logger.warning("what was known before is not: %s", error)
            self._remove()
            self._authenticator.restore({}, 0)

    async def run(self) -> None:
        """Write what has changed every two seconds, and what was forgotten at once, until cancelled."""
        while True:
            await self._authenticator.wait_for_change(_INTERVAL_S)
            await self.write()

    async def write(self) -> None:
        """Write what has changed. Cancelled, it is written all the same, before `close` returns."""
        changes, revision = self._authenticator.take_changes(), self._authenticator.revision
        content = self._registry.content
        if content is None or content.revision == self._registry_revision:
            content = None
        if not changes and content is None and revision == self._revision:
            return
        unbound = None
        if any(changes.values()):
            unbound = _Unbound(self._budgets.unbound_organizations(), self._clock.now().timestamp())
        writing = functools.partial(self._write, changes, revision, content, unbound)
        await asyncio.get_running_loop().run_in_executor(self._writer, writing)

    def close(self) -> None:
        """Let go of the folder, once everything is written."""
        self._writer.shutdown()
        if self._env is not None:
            self._env.close()

    def _opened(self) -> lmdb.Environment:
        if self._env is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            env = lmdb.open(str(self._folder), map_size=_MAP_BYTES, mode=0o600, max_dbs=2, sync=False)
            try:
                self._principals = env.open_db(b"principals-%d" % _VERSION)
                self._settings = env.open_db(b"settings-%d" % _VERSION)
            except lmdb.Error:
                env.close()
                raise
            self._env = env
        return self._env

    def _remove(self) -> None:
        """Forget everything on disk, as what cannot be written any more would bring back who was forgotten since."""
        if self._env is not None:
            self._env.close()
            self._env = None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._revision = self._registry_revision = None

    def _restore(self, env: lmdb.Environment) -> None:
        known: dict[bytes, Confirmed] = {}
        with env.begin() as transaction:
            for digest, value in transaction.cursor(self._principals):
                try:
                    message = principal_pb2.Principal.FromString(value[_CONFIRMED_AT.size :])
                    (confirmed_at,) = _CONFIRMED_AT.unpack_from(value)
                    known[digest] = Confirmed(Principal.from_proto(message), confirmed_at)
                except (DecodeError, struct.error, ValueError):
                    logger.warning("a principal that was known cannot be read")
            registry = transaction.get(_REGISTRY, db=self._settings)
            unbound = transaction.get(_UNBOUND, db=self._settings)
            revision = transaction.get(_REVISION, db=self._settings)
        self._authenticator.restore(known, 0 if revision is None else int.from_bytes(revision))
        try:
            if registry is not None:
                self._registry.restore(msgspec.msgpack.decode(registry, type=RegistryContent))
            if unbound is not None:
                told = msgspec.msgpack.decode(unbound, type=_Unbound)
                if self._clock.now().timestamp() - told.confirmed_at < self._unconfirmed_s:
                    self._budgets.restore(told.organization_ids)
        except msgspec.MsgspecError as error:
            logger.warning("the registry that was known cannot be read: %s", error)

    def _write(
        self,
        changes: Mapping[bytes, Confirmed | None],
        revision: int,
        content: RegistryContent | None,
        unbound: _Unbound | None,
    ) -> None:
        """In the one thread that writes. Who was forgotten and the revision that says so are written together."""
        try:
            env = self._opened()
            with env.begin(write=True) as transaction:
                for digest, known in changes.items():
                    if known is None:
                        transaction.delete(digest, db=self._principals)
                    else:
                        value = _CONFIRMED_AT.pack(known.confirmed_at) + known.principal.to_proto().SerializeToString()
                        transaction.put(digest, value, db=self._principals)
                transaction.put(_REVISION, revision.to_bytes(8), db=self._settings)
                if unbound is not None:
                    transaction.put(_UNBOUND, msgspec.msgpack.encode(unbound), db=self._settings)
                if content is not None:
                    transaction.put(_REGISTRY, msgspec.msgpack.encode(content), db=self._settings)
            if content is not None or None in changes.values():
                env.sync(True)
        except (lmdb.Error, OSError) as error:
            logger.warning("what is known cannot be written, and is removed: %s", error)
            self._remove()
            return
        self._revision = revision
        if content is not None:
            self._registry_revision = content.revision
