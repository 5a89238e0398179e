"""StatementService over gRPC: requests to the domain, its answers back; it never decides anything."""

from __future__ import annotations

import msgspec

from aiaas.analytics.v1 import statement_service_pb2 as pb
from aiaas.analytics.v1 import statement_service_pb2_grpc
from analytics.statement_issuer import StatementIssuer
from analytics.statement_store import StatementStore
from analytics.statement_verifier import StatementVerifier
from analytics.statements import Month, Statement, StatementLine
from mesh.conversions import to_timestamp
from mesh.errors import PlatformError, Reason
from mesh.fields import check_all, check_id, require
from mesh.pages import cut, read_page_size, read_token


class _MonthPlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of months."""

    year: int
    month: int


class _LinePlace(msgspec.Struct, frozen=True, array_like=True):
    """A place in the order of lines."""

    line_number: int


class StatementService(statement_service_pb2_grpc.StatementServiceServicer):
    """aiaas.analytics.v1.StatementService."""

    def __init__(self, store: StatementStore, issuer: StatementIssuer, verifier: StatementVerifier) -> None:
        self._store = store
        self._issuer = issuer
        self._verifier = verifier

    async def GetStatement(self, request: pb.GetStatementRequest, context: object) -> pb.GetStatementResponse:
        """One statement, and the public key that verifies it."""
        statement = await self._find(request)
        key = await self._store.key(statement.key_id)
        return pb.GetStatementResponse(statement=_message(statement), public_key=key.public_key if key else b"")

    async def ListStatements(self, request: pb.ListStatementsRequest, context: object) -> pb.ListStatementsResponse:
        """A page of statements."""
        organization_id = check_id(request.organization_id, "organization_id")
        size, place = read_page_size(request.page_size), read_token(request, _MonthPlace)
        before = None if place is None else Month(place.year, place.month)
        found = await self._store.page(organization_id, before, size + 1)
        statements, token = cut(request, found, size, _message, lambda statement: _MonthPlace(*statement.month))
        return pb.ListStatementsResponse(statements=statements, next_page_token=token)

    async def ListStatementLines(
        self, request: pb.ListStatementLinesRequest, context: object
    ) -> pb.ListStatementLinesResponse:
        """A page of lines."""
        statement = await self._find(request)
        size, place = read_page_size(request.page_size), read_token(request, _LinePlace)
        after = 0 if place is None else place.line_number
        found = await self._store.lines(statement.organization_id, statement.statement_id, after, size + 1)
        lines, token = cut(request, found, size, _line_message, lambda line: _LinePlace(line.line_number))
        return pb.ListStatementLinesResponse(statement_lines=lines, next_page_token=token)

    async def VerifyStatement(self, request: pb.VerifyStatementRequest, context: object) -> pb.VerifyStatementResponse:
        """Whether a statement is as it was issued."""
        verdict = await self._verifier.verify(*_names(request))
        return pb.VerifyStatementResponse(
            intact=verdict.flaw is None,
            recomputed=verdict.is_recomputed,
            first_broken_line=verdict.flaw.line_number if verdict.flaw else 0,
            problem=verdict.flaw.problem if verdict.flaw else "",
        )

    async def IssueStatement(self, request: pb.IssueStatementRequest, context: object) -> pb.IssueStatementResponse:
        """The statement of a month."""
        organization_id = check_id(request.organization_id, "organization_id")
        check_all(
            lambda: require(2000 <= request.year <= 9000, "year", "must be from 2000 to 9000"),
            lambda: require(1 <= request.month <= 12, "month", "must be from 1 to 12"),
        )
        statement = await self._issuer.issue(organization_id, Month(request.year, request.month))
        return pb.IssueStatementResponse(statement=_message(statement))

    async def _find(self, request: pb.GetStatementRequest | pb.ListStatementLinesRequest) -> Statement:
        statement = await self._store.get(*_names(request))
        if statement is None:
            raise PlatformError(Reason.NOT_FOUND)
        return statement


def _names(
    request: pb.GetStatementRequest | pb.ListStatementLinesRequest | pb.VerifyStatementRequest,
) -> tuple[str, str]:
    return check_id(request.organization_id, "organization_id"), check_id(request.statement_id, "statement_id")


def _message(statement: Statement) -> pb.Statement:
    return pb.Statement(
        statement_id=statement.statement_id,
        organization_id=statement.organization_id,
        year=statement.month.year,
        month=statement.month.month,
        lines=statement.lines,
        requests=statement.requests,
        prompt_tokens=statement.prompt_tokens,
        completion_tokens=statement.completion_tokens,
        cost_micros=statement.cost_micros,
        issue_time=to_timestamp(statement.issue_time),
        previous_hash=statement.previous_hash,
        hash=statement.hash,
        key_id=statement.key_id,
        signature=statement.signature,
    )


def _line_message(line: StatementLine) -> pb.StatementLine:
    month, api_key_id, model, price_id = line.group
    return pb.StatementLine(
        line_number=line.line_number,
        kind=line.kind,
        year=month.year,
        month=month.month,
        api_key_id=api_key_id,
        model=model,
        price_id=price_id,
        **line.amounts._asdict(),
        hash=line.hash,
        signature=line.signature,
    )
