"""All SQL of the registry: models, backends, prices, routing policies, first answers to repeated creations; it never
judges a value.

Every change first takes the one row of `registry_revision`. Changes therefore go one after another, what a change
checked still holds when it writes, and the number tells every router that there is something new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

import asyncpg
import msgspec

from mesh.database import Connection, Database
from mesh.errors import PlatformError, Reason
from router.backends import Backend, BackendModel, RegistryContent, unknown_model
from router.models import Model, name_taken
from router.prices import Price, already_priced
from router.routing_policies import RoutingPolicy, unknown_backend, unknown_fallback

_REMEMBERED = timedelta(days=1)
_Resource = TypeVar("_Resource", Model, Backend, Price)

_MODELS = """
SELECT m.model_id, m.owner, m.context_tokens, m.endpoints, m.create_time, m.update_time, m.revision,
       ARRAY(SELECT n.name FROM model_names n WHERE n.model_id = m.model_id AND n.position > 0 ORDER BY n.position)
         AS aliases
FROM models m
"""
_BACKENDS = """
SELECT b.*,
       ARRAY(SELECT s.model_id FROM backend_models s WHERE s.backend_id = b.backend_id ORDER BY s.position)
         AS model_ids,
       ARRAY(SELECT s.upstream_model FROM backend_models s WHERE s.backend_id = b.backend_id ORDER BY s.position)
         AS upstream_models
FROM backends b
"""
# The versions that hold or are yet to begin. Those that were replaced more than an hour ago are history, since no clock
# is off by so much.
_PRICES_IN_USE = """
SELECT p.*
FROM models m
CROSS JOIN LATERAL (
    SELECT coalesce(max(valid_from), '-infinity') AS since
    FROM prices WHERE model_id = m.model_id AND valid_from <= now() - interval '1 hour'
) held
JOIN prices p ON p.model_id = m.model_id AND p.valid_from >= held.since
ORDER BY p.model_id, p.valid_from
"""


@dataclass(frozen=True, slots=True)
class Creation:
    """A creation that may be repeated: who asks (`scope`), under which `request_id`, and a digest of what is asked."""

    scope: str
    request_id: str
    digest: bytes


class Store:
    """Models, backends and prices. Every method raises PlatformError(UNAVAILABLE) while PostgreSQL is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def revision(self) -> int:
        """The number that grows with each change."""
        rows = await self._database.fetch("SELECT revision FROM registry_revision")
        return int(rows[0]["revision"])

    async def load(self) -> RegistryContent:
        """All that requests need, of one moment, in the order of ids; prices then in the order in which they begin."""
        async with self._database.transaction() as connection:
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            revision = await connection.fetchval("SELECT revision FROM registry_revision")
            models = await connection.fetch(_MODELS + "ORDER BY m.model_id")
            backends = await connection.fetch(_BACKENDS + "ORDER BY b.backend_id")
            prices = await connection.fetch(_PRICES_IN_USE)
            policies = await connection.fetch("SELECT * FROM routing_policies ORDER BY model_id")
        return RegistryContent(
            revision,
            tuple(map(_model, models)),
            tuple(map(_backend, backends)),
            tuple(map(_price, prices)),
            tuple(map(_routing_policy, policies)),
        )

    async def create_model(self, model: Model, creation: Creation | None) -> Model:
        """Register a model, or return the first answer to the same creation.

        Raises PlatformError: ALREADY_EXISTS, INVALID_ARGUMENT for an alias that is taken.
        """
        async with self._database.transaction() as connection:
            revision = await _next_revision(connection)
            if known := await _first_answer(connection, creation, Model):
                return known
            if await connection.fetchval("SELECT true FROM model_names WHERE name = $1", model.model_id):
                raise PlatformError(Reason.ALREADY_EXISTS, field="model.model_id")
            created = await _insert_model(connection, model, revision)
            await _remember(connection, creation, created)
            return created

    async def get_model(self, model_id: str) -> Model:
        """One model. Raises PlatformError(NOT_FOUND)."""
        rows = await self._database.fetch(_MODELS + "WHERE m.model_id = $1", model_id)
        return _model(_one(rows))

    async def list_models(self, after: str, limit: int) -> list[Model]:
        """Up to `limit` models whose ids come after `after`, in their order."""
        rows = await self._database.fetch(_MODELS + "WHERE m.model_id > $1 ORDER BY m.model_id LIMIT $2", after, limit)
        return list(map(_model, rows))

    async def update_model(
        self, model_id: str, etag: str, change: Callable[[Model], Model], make: Callable[[], Model] | None
    ) -> Model:
        """Replace a model by what `change` makes of it, or register what `make` makes where it does not exist.

        Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for an etag that is not the current one, INVALID_ARGUMENT
        for an alias that is taken, and whatever `change` and `make` raise.
        """
        async with self._database.transaction() as connection:
            revision = await _next_revision(connection)
            rows = await connection.fetch(_MODELS + "WHERE m.model_id = $1", model_id)
            if not rows and make is not None and not etag:
                if await connection.fetchval("SELECT true FROM model_names WHERE name = $1", model_id):
                    raise PlatformError(Reason.ALREADY_EXISTS, field="model_id")
                return await _insert_model(connection, make(), revision)
            current = _model(_one(rows))
            _check_etag(current.etag, etag, "model.etag")
            changed = change(current)
            if changed == current:
                return current
            await connection.execute(
                "UPDATE models SET owner = $2, context_tokens = $3, endpoints = $4, update_time = now(), revision = $5"
                " WHERE model_id = $1",
                model_id,
                changed.owner,
                changed.context_tokens,
                changed.endpoints,
                revision,
            )
            await connection.execute("DELETE FROM model_names WHERE model_id = $1", model_id)
            await _insert_names(connection, changed)
            return _model(_one(await connection.fetch(_MODELS + "WHERE m.model_id = $1", model_id)))

    async def delete_model(self, model_id: str, etag: str) -> None:
        """Remove a model and its prices.

        Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for a wrong etag or while a backend serves the model.
        """
        async with self._database.transaction() as connection:
            await _next_revision(connection)
            current = _model(_one(await connection.fetch(_MODELS + "WHERE m.model_id = $1", model_id)))
            _check_etag(current.etag, etag, "etag")
            if await connection.fetchval("SELECT true FROM backend_models WHERE model_id = $1 LIMIT 1", model_id):
                raise PlatformError(
                    Reason.FAILED_PRECONDITION, description="The model is still served by at least one backend."
                )
            await connection.execute("DELETE FROM models WHERE model_id = $1", model_id)

    async def create_backend(self, backend: Backend, creation: Creation | None) -> Backend:
        """Register a backend, or return the first answer to the same creation.

        Raises PlatformError: ALREADY_EXISTS, INVALID_ARGUMENT for a model that is not registered.
        """
        async with self._database.transaction() as connection:
            revision = await _next_revision(connection)
            if known := await _first_answer(connection, creation, Backend):
                return known
            if await connection.fetchval("SELECT true FROM backends WHERE backend_id = $1", backend.backend_id):
                raise PlatformError(Reason.ALREADY_EXISTS, field="backend.backend_id")
            created = await _insert_backend(connection, backend, revision)
            await _remember(connection, creation, created)
            return created

    async def get_backend(self, backend_id: str) -> Backend:
        """One backend. Raises PlatformError(NOT_FOUND)."""
        return _backend(_one(await self._database.fetch(_BACKENDS + "WHERE b.backend_id = $1", backend_id)))

    async def list_backends(self, after: str, limit: int, model_id: str) -> list[Backend]:
        """Up to `limit` backends whose ids come after `after`, in their order; of one model, unless that is empty."""
        rows = await self._database.fetch(
            _BACKENDS
            + "WHERE b.backend_id > $1 AND ($3 = '' OR EXISTS"
            + " (SELECT FROM backend_models s WHERE s.backend_id = b.backend_id AND s.model_id = $3))"
            + " ORDER BY b.backend_id LIMIT $2",
            after,
            limit,
            model_id,
        )
        return list(map(_backend, rows))

    async def update_backend(
        self, backend_id: str, etag: str, change: Callable[[Backend], Backend], make: Callable[[], Backend] | None
    ) -> Backend:
        """Replace a backend by what `change` makes of it, or register what `make` makes where it does not exist.

        Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for an etag that is not the current one, INVALID_ARGUMENT
        for a model that is not registered, and whatever `change` and `make` raise.
        """
        async with self._database.transaction() as connection:
            revision = await _next_revision(connection)
            rows = await connection.fetch(_BACKENDS + "WHERE b.backend_id = $1", backend_id)
            if not rows and make is not None and not etag:
                return await _insert_backend(connection, make(), revision)
            current = _backend(_one(rows))
            _check_etag(current.etag, etag, "backend.etag")
            changed = change(current)
            if changed == current:
                return current
            await connection.execute(
                "UPDATE backends SET base_url = $2, engine = $3, weight = $4, limit_concurrent_requests = $5,"
                " draining = $6, first_byte_timeout_millis = $7, credential_variable = $8, update_time = now(),"
                " revision = $9 WHERE backend_id = $1",
                *_columns(changed),
                revision,
            )
            await connection.execute("DELETE FROM backend_models WHERE backend_id = $1", backend_id)
            await _insert_backend_models(connection, changed)
            return _backend(_one(await connection.fetch(_BACKENDS + "WHERE b.backend_id = $1", backend_id)))

    async def delete_backend(self, backend_id: str, etag: str) -> None:
        """Remove a backend. Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for a wrong etag."""
        async with self._database.transaction() as connection:
            await _next_revision(connection)
            current = _backend(_one(await connection.fetch(_BACKENDS + "WHERE b.backend_id = $1", backend_id)))
            _check_etag(current.etag, etag, "etag")
            await connection.execute("DELETE FROM backends WHERE backend_id = $1", backend_id)

    async def create_price(self, model_id: str, make: Callable[[datetime], Price], creation: Creation | None) -> Price:
        """Add the price that `make` makes of the present moment, or return the first answer to the same creation.

        The moment is the database's, read once it is this change's turn, so that later prices begin later. Raises
        PlatformError: NOT_FOUND for the model, ALREADY_EXISTS, and whatever `make` raises.
        """
        async with self._database.transaction() as connection:
            await _next_revision(connection)
            if known := await _first_answer(connection, creation, Price):
                return known
            _one(await connection.fetch("SELECT FROM models WHERE model_id = $1", model_id))
            price = make(await connection.fetchval("SELECT clock_timestamp()"))
            if await connection.fetchval(
                "SELECT true FROM prices WHERE model_id = $1 AND valid_from = $2", model_id, price.valid_from
            ):
                raise already_priced()
            await connection.execute(
                "INSERT INTO prices (price_id, model_id, prompt_micros_per_million, cached_prompt_micros_per_million,"
                " completion_micros_per_million, valid_from, create_time) VALUES ($1, $2, $3, $4, $5, $6, $7)",
                *dataclasses.astuple(price),
            )
            await _remember(connection, creation, price)
            return price

    async def list_prices(self, model_id: str, before: datetime | None, limit: int) -> list[Price]:
        """Up to `limit` prices of a model that begin before `before`, or all, the latest first.

        Raises PlatformError(NOT_FOUND) if there is no such model.
        """
        rows = await self._database.fetch(
            "SELECT * FROM prices WHERE model_id = $1 AND valid_from < coalesce($2::timestamptz, 'infinity')"
            " ORDER BY valid_from DESC LIMIT $3",
            model_id,
            before,
            limit,
        )
        if not rows:
            await self.get_model(model_id)
        return list(map(_price, rows))

    async def get_routing_policy(self, model_id: str) -> RoutingPolicy:
        """A model's policy, the defaults where it has none. Raises PlatformError(NOT_FOUND) for an unknown model."""
        rows = await self._database.fetch("SELECT * FROM routing_policies WHERE model_id = $1", model_id)
        if rows:
            return _routing_policy(rows[0])
        await self.get_model(model_id)
        return RoutingPolicy(model_id)

    async def list_routing_policies(self, after: str, limit: int) -> list[RoutingPolicy]:
        """Up to `limit` policies of models whose ids come after `after`, in their order."""
        rows = await self._database.fetch(
            "SELECT * FROM routing_policies WHERE model_id > $1 ORDER BY model_id LIMIT $2", after, limit
        )
        return list(map(_routing_policy, rows))

    async def update_routing_policy(
        self, model_id: str, etag: str, change: Callable[[RoutingPolicy], RoutingPolicy], *, make: bool
    ) -> RoutingPolicy:
        """Replace a policy by what `change` makes of it, or of the defaults where `make` says so.

        Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for an etag that is not the current one, INVALID_ARGUMENT
        for a backend or a model that is not registered, and whatever `change` raises.
        """
        async with self._database.transaction() as connection:
            revision = await _next_revision(connection)
            _one(await connection.fetch("SELECT FROM models WHERE model_id = $1", model_id))
            rows = await connection.fetch("SELECT * FROM routing_policies WHERE model_id = $1", model_id)
            current = _routing_policy(_one(rows)) if rows or etag or not make else RoutingPolicy(model_id)
            _check_etag(current.etag, etag, "routing_policy.etag")
            changed = change(current)
            if rows and changed == current:
                return current
            await _check_named(connection, changed)
            stored = await connection.fetch(
                "INSERT INTO routing_policies (model_id, policy, revision) VALUES ($1, $2, $3) ON CONFLICT (model_id)"
                " DO UPDATE SET policy = excluded.policy, update_time = now(), revision = excluded.revision"
                " RETURNING *",
                model_id,
                msgspec.json.encode(changed).decode(),
                revision,
            )
            return _routing_policy(_one(stored))

    async def delete_routing_policy(self, model_id: str, etag: str) -> None:
        """Remove a policy. Raises PlatformError: NOT_FOUND, FAILED_PRECONDITION for a wrong etag."""
        async with self._database.transaction() as connection:
            await _next_revision(connection)
            rows = await connection.fetch("SELECT * FROM routing_policies WHERE model_id = $1", model_id)
            _check_etag(_routing_policy(_one(rows)).etag, etag, "etag")
            await connection.execute("DELETE FROM routing_policies WHERE model_id = $1", model_id)


async def _next_revision(connection: Connection) -> int:
    return int(await connection.fetchval("UPDATE registry_revision SET revision = revision + 1 RETURNING revision"))


async def _first_answer(connection: Connection, creation: Creation | None, kind: type[_Resource]) -> _Resource | None:
    if creation is None:
        return None
    await connection.execute("DELETE FROM creations WHERE create_time < now() - $1::interval", _REMEMBERED)
    row = await connection.fetchrow(
        "SELECT digest, answer FROM creations WHERE scope = $1 AND request_id = $2",
        creation.scope,
        creation.request_id,
    )
    if row is None:
        return None
    if row["digest"] != creation.digest:
        raise PlatformError(
            Reason.INVALID_ARGUMENT,
            field="request_id",
            description="'request_id' was used before, for another request.",
        )
    return msgspec.json.decode(row["answer"], type=kind)


async def _remember(connection: Connection, creation: Creation | None, answer: Model | Backend | Price) -> None:
    if creation is not None:
        await connection.execute(
            "INSERT INTO creations (scope, request_id, digest, answer) VALUES ($1, $2, $3, $4)",
            creation.scope,
            creation.request_id,
            creation.digest,
            msgspec.json.encode(answer).decode(),
        )


async def _insert_model(connection: Connection, model: Model, revision: int) -> Model:
    await connection.execute(
        "INSERT INTO models (model_id, owner, context_tokens, endpoints, revision) VALUES ($1, $2, $3, $4, $5)",
        model.model_id,
        model.owner,
        model.context_tokens,
        model.endpoints,
        revision,
    )
    await _insert_names(connection, model)
    return _model(_one(await connection.fetch(_MODELS + "WHERE m.model_id = $1", model.model_id)))


async def _insert_names(connection: Connection, model: Model) -> None:
    names = (model.model_id, *model.aliases)
    taken = await connection.fetch("SELECT name FROM model_names WHERE name = ANY($1)", names)
    if taken:
        raise name_taken(f"model.aliases[{model.aliases.index(taken[0]['name'])}]")
    await connection.executemany(
        "INSERT INTO model_names (name, model_id, position) VALUES ($1, $2, $3)",
        [(name, model.model_id, position) for position, name in enumerate(names)],
    )


async def _insert_backend(connection: Connection, backend: Backend, revision: int) -> Backend:
    await connection.execute(
        "INSERT INTO backends (backend_id, base_url, engine, weight, limit_concurrent_requests, draining,"
        " first_byte_timeout_millis, credential_variable, revision) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        *_columns(backend),
        revision,
    )
    await _insert_backend_models(connection, backend)
    return _backend(_one(await connection.fetch(_BACKENDS + "WHERE b.backend_id = $1", backend.backend_id)))


async def _insert_backend_models(connection: Connection, backend: Backend) -> None:
    rows = await connection.fetch(
        "SELECT model_id FROM models WHERE model_id = ANY($1)", [model.model_id for model in backend.models]
    )
    registered = {row["model_id"] for row in rows}
    for index, model in enumerate(backend.models):
        if model.model_id not in registered:
            raise unknown_model(index)
    await connection.executemany(
        "INSERT INTO backend_models (backend_id, model_id, upstream_model, position) VALUES ($1, $2, $3, $4)",
        [
            (backend.backend_id, model.model_id, model.upstream_model, position)
            for position, model in enumerate(backend.models)
        ],
    )


async def _check_named(connection: Connection, policy: RoutingPolicy) -> None:
    for known, names, unknown in (
        ("SELECT backend_id FROM backends WHERE backend_id = ANY($1)", list(policy.weights), unknown_backend),
        ("SELECT model_id FROM models WHERE model_id = ANY($1)", policy.fallback_model_ids, unknown_fallback),
    ):
        registered = {row[0] for row in await connection.fetch(known, names)}
        for index, name in enumerate(names):
            if name not in registered:
                raise unknown(index)


def _columns(backend: Backend) -> tuple[Any, ...]:
    return (
        backend.backend_id,
        backend.base_url,
        backend.engine,
        backend.weight,
        backend.limit_concurrent_requests,
        backend.draining,
        backend.first_byte_timeout_millis,
        backend.credential_variable,
    )


def _one(rows: list[asyncpg.Record]) -> asyncpg.Record:
    if not rows:
        raise PlatformError(Reason.NOT_FOUND)
    return rows[0]


def _check_etag(current: str, given: str, field: str) -> None:
    if given and given != current:
        raise PlatformError(
            Reason.FAILED_PRECONDITION,
            field=field,
            description=f"'{field}' is not the current one: the resource was changed in the meantime.",
        )


def _model(row: asyncpg.Record) -> Model:
    return Model(
        model_id=row["model_id"],
        aliases=tuple(row["aliases"]),
        owner=row["owner"],
        context_tokens=row["context_tokens"],
        endpoints=tuple(row["endpoints"]),
        create_time=row["create_time"],
        update_time=row["update_time"],
        etag=str(row["revision"]),
    )


def _backend(row: asyncpg.Record) -> Backend:
    return Backend(
        backend_id=row["backend_id"],
        base_url=row["base_url"],
        engine=row["engine"],
        models=tuple(map(BackendModel, row["model_ids"], row["upstream_models"])),
        weight=row["weight"],
        limit_concurrent_requests=row["limit_concurrent_requests"],
        draining=row["draining"],
        first_byte_timeout_millis=row["first_byte_timeout_millis"],
        credential_variable=row["credential_variable"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        etag=str(row["revision"]),
    )


def _price(row: asyncpg.Record) -> Price:
    return Price(**row)


def _routing_policy(row: asyncpg.Record) -> RoutingPolicy:
    policy = msgspec.json.decode(row["policy"], type=RoutingPolicy)
    return dataclasses.replace(
        policy, model_id=row["model_id"], update_time=row["update_time"], etag=str(row["revision"])
    )
