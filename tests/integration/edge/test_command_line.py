"""The command line as a person runs it, in a process of its own, against an edge on a real socket."""

import asyncio
import hashlib
import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aiaas.analytics.v1 import export_service_pb2 as export_pb
from aiaas.analytics.v1 import reconciliation_service_pb2
from aiaas.identity.v1 import api_key_service_pb2, audit_service_pb2, auth_service_pb2, user_service_pb2
from aiaas.identity.v1 import configuration_service_pb2 as configuration_pb
from aiaas.identity.v1 import session_service_pb2 as session_pb
from aiaas.router.v1 import backend_service_pb2
from aiaas.router.v1 import inference_service_pb2 as inference_pb
from aiaas.type.v1 import principal_pb2
from mesh.errors import PlatformError, Reason
from tests.doubles.peer import PeerDouble
from tests.integration.edge.harness import Edge, until
from tests.integration.edge.test_organization import InTurn

ROOT = Path(__file__).parents[3]
TOKEN = "aias_not_for_any_log"


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


class CommandLine:
    """`aiaas` with a folder of its own, signed in unless told otherwise."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AIAAS_")},
            "AIAAS_CONFIG_DIR": str(folder / "config"),
            "AIAAS_URL": f"http://127.0.0.1:{port}",
            "AIAAS_ORGANIZATION": "org_1",
            "AIAAS_TOKEN": TOKEN,
        }

    async def start(self, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "cli", *arguments),
            cwd=ROOT,
            env=self.environment | environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str, typed: str = "", **environment: str) -> Ran:
        process = await self.start(*arguments, **environment)
        async with asyncio.timeout(60):
            out, err = await process.communicate(typed.encode() or None)
        assert process.returncode is not None
        return Ran(process.returncode, out.decode(), err.decode())


@pytest.fixture
def aiaas(edge: Edge, tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path, edge.port)


async def test_command_becomes_the_rpc_with_credential_and_idempotency_key(
    aiaas: CommandLine, identity: PeerDouble
) -> None:
    identity.answers["CreateApiKey"] = api_key_service_pb2.CreateApiKeyResponse(
        api_key=api_key_service_pb2.ApiKey(api_key_id="key_1", display_name="x"), secret="aias_shown_once"
    )
    ran = await aiaas.run(
        "keys", "create", "--display-name", "x", "--scopes", "usage.*", "--scopes", "a.b", "-o", "json"
    )
    assert (ran.code, ran.err) == (0, "")
    assert ran.document["api_key"]["api_key_id"] == "key_1"
    (call,) = identity.received
    assert call.metadata["authorization"] == f"Bearer {TOKEN}"
    assert call.request.organization_id == "org_1"
    assert call.request.api_key.scopes == ["usage.*", "a.b"]
    assert len(call.request.request_id) == 36


async def test_secret_goes_into_a_file_of_its_owner_and_nowhere_else(aiaas: CommandLine, identity: PeerDouble) -> None:
    identity.answers["CreateApiKey"] = api_key_service_pb2.CreateApiKeyResponse(secret="aias_shown_once")
    path = aiaas.folder / "key"
    ran = await aiaas.run("keys", "create", "--display-name", "x", "--secret-file", str(path), "-o", "json")
    assert ran.code == 0, ran.err
    assert path.read_text() == "aias_shown_once\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "aias_shown_once" not in ran.out + ran.err
    again = await aiaas.run("keys", "create", "--display-name", "x", "--secret-file", str(path))
    assert (again.code, len(identity.received)) == (2, 1), "a key must not be made whose text would be lost"


async def test_path_query_and_body_are_bound_as_the_contract_says(
    aiaas: CommandLine, identity: PeerDouble, router: PeerDouble
) -> None:
    line = ["backends", "update", "a/b c", "--models", "model_id=m,upstream_model=u", "--draining", "--weight", "7"]
    ran = await aiaas.run(*line, "--allow-missing", "--clear", "credential-variable", "--etag", "e1")
    assert ran.code == 0, ran.err
    (call,) = router.received
    backend = backend_service_pb2.Backend(draining=True, weight=7, etag="e1")
    backend.models.add(model_id="m", upstream_model="u")
    assert call.request.backend == backend
    assert call.request.backend_id == "a/b c"
    assert call.request.allow_missing
    assert sorted(call.request.update_mask.paths) == ["credential_variable", "draining", "models", "weight"]
    assert (await aiaas.run("keys", "list", "--state", "active", "--page-size", "5")).code == 0
    assert identity.received[-1].request == api_key_service_pb2.ListApiKeysRequest(
        organization_id="org_1", state=api_key_service_pb2.API_KEY_STATE_ACTIVE, page_size=5
    )


async def test_body_comes_from_a_file_and_options_change_it(aiaas: CommandLine, identity: PeerDouble) -> None:
    (aiaas.folder / "key.yaml").write_text("display_name: file\nexpire_time: 2030-01-31T00:00:00Z\nscopes: [a.b]\n")
    ran = await aiaas.run("keys", "create", "--from", str(aiaas.folder / "key.yaml"), "--display-name", "option")
    assert ran.code == 0, ran.err
    key = identity.received[0].request.api_key
    assert (key.display_name, list(key.scopes), key.expire_time.seconds) == ("option", ["a.b"], 1896048000)


async def test_dry_run_shows_the_request_and_sends_nothing(aiaas: CommandLine, identity: PeerDouble) -> None:
    ran = await aiaas.run("users", "remove", "user_1", "--dry-run")
    assert (ran.code, identity.received) == (0, [])
    assert ran.out.startswith("DELETE http://127.0.0.1:")
    assert "/admin/v1/organizations/org_1/users/user_1" in ran.out
    assert TOKEN not in ran.out + ran.err


async def test_what_destroys_wants_a_yes(aiaas: CommandLine, identity: PeerDouble) -> None:
    refused = await aiaas.run("keys", "revoke", "key_1")
    assert (refused.code, identity.received) == (2, [])
    assert "--yes" in refused.err
    assert (await aiaas.run("keys", "revoke", "key_1", "--yes")).code == 0
    assert [call.rpc for call in identity.received] == ["RevokeApiKey"]


async def test_error_tells_reason_field_and_request_id(aiaas: CommandLine, identity: PeerDouble) -> None:
    identity.answers["CreateApiKey"] = PlatformError(
        Reason.INVALID_ARGUMENT, field="api_key.display_name", description="'api_key.display_name' is too long."
    )
    ran = await aiaas.run("keys", "create", "--display-name", "x")
    assert (ran.code, ran.out) == (1, "")
    for expected in ("is too long.", "INVALID_ARGUMENT", "api_key.display_name", "req_"):
        assert expected in ran.err


async def test_refusal_for_now_is_repeated_when_the_platform_says(aiaas: CommandLine, identity: PeerDouble) -> None:
    identity.answers["ListApiKeys"] = PlatformError(Reason.RATE_LIMIT_EXCEEDED, retry_after_s=2)
    running = asyncio.create_task(aiaas.run("keys", "list"))
    await until(lambda: len(identity.received) == 1, within_s=30)
    began = asyncio.get_running_loop().time()
    identity.answers["ListApiKeys"] = api_key_service_pb2.ListApiKeysResponse()
    ran = await running
    assert ran.code == 0, ran.err
    assert asyncio.get_running_loop().time() - began >= 1.5
    assert [call.rpc for call in identity.received] == ["ListApiKeys"] * 2


async def test_longer_wait_than_anybody_has_is_told_instead(aiaas: CommandLine, identity: PeerDouble) -> None:
    identity.answers["ListApiKeys"] = PlatformError(Reason.RATE_LIMIT_EXCEEDED, retry_after_s=3600)
    ran = await aiaas.run("keys", "list")
    assert (ran.code, len(identity.received)) == (3, 1)
    assert "3600 s" in ran.err


async def test_only_what_may_be_done_twice_is_sent_twice(aiaas: CommandLine, identity: PeerDouble) -> None:
    for rpc in ("CreateApiKey", "UpdateApiKey"):
        identity.answers[rpc] = PlatformError(Reason.UNAVAILABLE)
    assert (await aiaas.run("keys", "create", "--display-name", "x")).code == 3
    made = [call.request.request_id for call in identity.received]
    assert len(made) == 4
    assert len(set(made)) == 1
    identity.received.clear()
    assert (await aiaas.run("keys", "update", "key_1", "--display-name", "x")).code == 3
    assert len(identity.received) == 1


async def test_unreachable_platform_and_missing_credential_have_their_codes(aiaas: CommandLine) -> None:
    away = await aiaas.run("orgs", "list", AIAAS_URL="http://127.0.0.1:1")
    assert (away.code, "doctor" in away.err) == (3, True)
    unknown = await aiaas.run("orgs", "list", AIAAS_TOKEN="")
    assert (unknown.code, "aiaas login" in unknown.err) == (2, True)
    nowhere = await aiaas.run("keys", "list", AIAAS_ORGANIZATION="")
    assert (nowhere.code, "--org" in nowhere.err) == (2, True)
    assert (await aiaas.run("keys", "lst")).code == 2


async def test_all_pages_are_followed(aiaas: CommandLine, identity: PeerDouble) -> None:
    first, last = user_service_pb2.ListUsersResponse(next_page_token="two"), user_service_pb2.ListUsersResponse()
    first.users.add(user_id="user_1")
    last.users.add(user_id="user_2")
    identity.answers = InTurn(ListUsers=[first, last])
    ran = await aiaas.run("users", "list", "--all", "--page-size", "1", "--field", "user_id")
    assert ran.out.split() == ["user_1", "user_2"]
    assert [(call.request.page_token, call.request.page_size) for call in identity.received] == [("", 1), ("two", 1)]


async def test_watch_asks_again_until_it_is_stopped(aiaas: CommandLine, identity: PeerDouble) -> None:
    process = await aiaas.start("keys", "list", "--watch", "0.1", "-o", "csv", "--columns", "api_key_id")
    await until(lambda: len(identity.received) >= 4, within_s=30)
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(10):
        out, err = await process.communicate()
    assert process.returncode == 130
    assert out.decode().split()[:3] == ["api_key_id"] * 3
    assert b"Traceback" not in err


async def test_stream_is_written_as_it_comes(aiaas: CommandLine, identity: PeerDouble) -> None:
    more = asyncio.Event()

    async def entries(_: Any) -> AsyncIterator[audit_service_pb2.ExportAuditEntriesResponse]:
        for number in range(2):
            yield audit_service_pb2.ExportAuditEntriesResponse(
                audit_entry=audit_service_pb2.AuditEntry(audit_entry_id=f"aud_{number}")
            )
            await more.wait()

    identity.streams["ExportAuditEntries"] = entries
    process = await aiaas.start("audit", "export", "--field", "audit_entry_id")
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b"aud_0\n"
        more.set()
        assert await process.stdout.read() == b"aud_1\n"
        assert await process.wait() == 0


async def test_chat_writes_words_as_they_come(aiaas: CommandLine, router: PeerDouble) -> None:
    more = asyncio.Event()

    def data(event: str) -> inference_pb.InferResponse:
        return inference_pb.InferResponse(data=f"data: {event}\n\n".encode())

    async def words(_: Any) -> AsyncIterator[inference_pb.InferResponse]:
        head = inference_pb.InferHead(content_type="text/event-stream")
        yield inference_pb.InferResponse(head=head)
        yield data('{"choices": [{"delta": {"content": "Bon"}}]}')
        await more.wait()
        yield data('{"choices": [{"delta": {"content": "jour\\u001b[2J"}}]}')
        yield data('{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}')
        yield data("[DONE]")
        yield inference_pb.InferResponse(tail=inference_pb.InferTail())

    router.streams["Infer"] = words
    process = await aiaas.start("chat", "m", "Good", "day", "--system", "In French.", "--usage")
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readexactly(3) == b"Bon"
        more.set()
        out, err = await process.communicate()
    assert (process.returncode, out, err) == (0, b"jour[2J\n", b"3 tokens in, 2 out\n")
    asked = json.loads(router.received[0].request.body)
    assert [message["content"] for message in asked["messages"]] == ["In French.", "Good day"]
    assert asked["stream"]


async def test_answer_that_breaks_off_is_a_failure(aiaas: CommandLine, router: PeerDouble) -> None:
    async def words(_: Any) -> AsyncIterator[inference_pb.InferResponse]:
        head = inference_pb.InferHead(content_type="text/event-stream")
        yield inference_pb.InferResponse(head=head)
        yield inference_pb.InferResponse(data=b'data: {"choices": [{"delta": {"content": "Bon"}}]}\n\n')
        raise PlatformError(Reason.UNAVAILABLE)

    router.streams["Infer"] = words
    ran = await aiaas.run("chat", "m", "Good day")
    assert (ran.code, ran.out) == (1, "Bon\n") or (ran.code, ran.out) == (1, "Bon")
    assert "broke off" in ran.err


async def test_login_keeps_a_token_only_after_the_platform_took_it(aiaas: CommandLine, identity: PeerDouble) -> None:
    aiaas.environment["AIAAS_TOKEN"] = ""
    aiaas.environment["AIAAS_ORGANIZATION"] = ""
    identity.answers["GetCurrentPrincipal"] = PlatformError(Reason.API_KEY_INVALID)
    refused = await aiaas.run("login", "--token-file", "-", typed="aias_wrong\n")
    assert refused.code == 1
    assert not (aiaas.folder / "config").exists()
    identity.answers["GetCurrentPrincipal"] = auth_service_pb2.GetCurrentPrincipalResponse(
        principal=principal_pb2.Principal(principal_id="key_1", organization_id="org_9")
    )
    taken = await aiaas.run("login", "--token-file", "-", typed="aias_right\n")
    assert taken.code == 0, taken.err
    assert "aias_right" not in taken.out + taken.err
    assert identity.received[-1].metadata["authorization"] == "Bearer aias_right"
    path = aiaas.folder / "config" / "profiles.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (await aiaas.run("keys", "list")).code == 0
    assert identity.received[-1].request.organization_id == "org_9"
    assert (await aiaas.run("logout")).code == 0
    assert "aias_right" not in path.read_text()
    assert (await aiaas.run("keys", "list")).code == 2


async def test_sign_in_with_password_and_second_factor(aiaas: CommandLine, identity: PeerDouble) -> None:
    aiaas.environment["AIAAS_TOKEN"] = ""
    challenged = session_pb.CreateSessionResponse()
    challenged.sign_in.mfa_challenge.challenge_token = "challenge"
    identity.answers["CreateSession"] = challenged
    identity.answers["VerifyMfa"] = session_pb.VerifyMfaResponse(session_token="aiss_session")
    identity.answers["GetCurrentPrincipal"] = auth_service_pb2.GetCurrentPrincipalResponse()
    password = aiaas.folder / "password"
    password.write_text("correct horse\n")
    ran = await aiaas.run("login", "--email", "ada@example.com", "--password-file", str(password), typed="123456\n")
    assert ran.code == 0, ran.err
    created, verified = identity.received[:2]
    assert (created.request.email, created.request.password) == ("ada@example.com", "correct horse")
    assert (verified.request.challenge_token, verified.request.totp_code) == ("challenge", "123456")
    assert identity.received[2].metadata["authorization"] == "Bearer aiss_session"


async def test_doctor_says_what_to_do(
    aiaas: CommandLine, identity: PeerDouble, router: PeerDouble, analytics: PeerDouble
) -> None:
    reports = reconciliation_service_pb2.ListReconciliationsResponse()
    for number, kind, state in ((3, 1, 2), (2, 2, 3), (1, 1, 3)):
        reports.reconciliations.add(reconciliation_id=f"report_{number}", kind=kind, state=state)
        reports.reconciliations[-1].start_time.FromSeconds(3600)
        reports.reconciliations[-1].end_time.FromSeconds(7200)
    analytics.answers["ListReconciliations"] = reports
    listed = backend_service_pb2.ListBackendsResponse()
    listed.backends.add(
        backend_id="b1",
        base_url="http://engine",
        health=backend_service_pb2.BACKEND_HEALTH_UNHEALTHY,
        health_reason="connection refused",
    )
    router.answers["ListBackends"] = listed
    identity.answers["GetCurrentPrincipal"] = PlatformError(Reason.API_KEY_INVALID)
    ran = await aiaas.run("doctor", "-o", "json")
    assert ran.code == 1
    found = {check["check"]: check for check in ran.document["checks"]}
    assert found["platform"]["state"] == found["identity"]["state"] == "ok"
    assert (found["credential"]["state"], found["credential"]["do"]) == ("bad", "`aiaas login`")
    assert "connection refused" in found["backend b1"]["found"]
    assert "http://engine" in found["backend b1"]["do"]
    assert (found["books of journal"]["state"], found["books of ledger"]["state"]) == ("ok", "bad")
    assert "list report_2" in found["books of ledger"]["do"]
    away = await aiaas.run("doctor", AIAAS_URL="http://127.0.0.1:1")
    assert (away.code, "cannot be reached" in away.out) == (1, True)


async def test_bench_measures_and_counts_what_fails(aiaas: CommandLine, router: PeerDouble) -> None:
    async def words(_: Any) -> AsyncIterator[inference_pb.InferResponse]:
        head = inference_pb.InferHead(content_type="text/event-stream")
        yield inference_pb.InferResponse(head=head)
        yield inference_pb.InferResponse(data=b'data: {"choices": [{"delta": {"content": "one"}}]}\n\n')
        yield inference_pb.InferResponse(data=b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\n')
        yield inference_pb.InferResponse(data=b"data: [DONE]\n\n")
        yield inference_pb.InferResponse(tail=inference_pb.InferTail())

    router.streams["Infer"] = words
    ran = await aiaas.run("bench", "m", "-n", "6", "-c", "3", "-o", "json")
    assert ran.code == 0, ran.err
    told = ran.document
    assert (told["requests"], told["failed"], told["completion_tokens"]) == (6, 0, 30)
    assert 0 < told["first_token_ms"]["p50"] <= told["whole_answer_ms"]["p99"]

    async def refused(asked: Any) -> AsyncIterator[inference_pb.InferResponse]:
        if asked:
            raise PlatformError(Reason.MODEL_NOT_FOUND)
        yield inference_pb.InferResponse()

    router.streams["Infer"] = refused
    failed = await aiaas.run("bench", "m", "-n", "2")
    assert (failed.code, "model_not_found" in failed.err) == (1, True)


@pytest.fixture
async def storage() -> AsyncIterator[tuple[str, list[bytes]]]:
    """Where a file of an export is, and the heads of the requests for it."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\na,b\n1,2\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/file?signature=x", heads


async def test_export_is_awaited_fetched_without_the_credential_and_held_against_its_checksum(
    aiaas: CommandLine, analytics: PeerDouble, storage: tuple[str, list[bytes]]
) -> None:
    url, heads = storage
    pending = export_pb.GetExportResponse(export=export_pb.Export(state=export_pb.EXPORT_STATE_RUNNING))
    analytics.answers["GetExport"] = pending
    path = aiaas.folder / "usage.csv"
    running = asyncio.create_task(aiaas.run("exports", "download", "export_1", "--to", str(path)))
    await until(lambda: len(analytics.received) == 1, within_s=30)
    done = export_pb.Export(state=export_pb.EXPORT_STATE_SUCCEEDED, rows=1, size_bytes=8)
    done.sha256 = hashlib.sha256(b"a,b\n1,2\n").digest()
    analytics.answers["GetExport"] = export_pb.GetExportResponse(export=done, download_url=url)
    ran = await running
    assert ran.code == 0, ran.err
    assert path.read_text() == "a,b\n1,2\n"
    assert TOKEN.encode() not in heads[0]

    done.sha256 = b"another"
    analytics.answers["GetExport"] = export_pb.GetExportResponse(export=done, download_url=url)
    damaged = await aiaas.run("exports", "download", "export_1", "--to", str(aiaas.folder / "damaged.csv"))
    assert (damaged.code, "checksum" in damaged.err) == (1, True)
    assert not list(aiaas.folder.glob("damaged*"))
    failed = export_pb.Export(state=export_pb.EXPORT_STATE_FAILED, failure_reason="NO_STORAGE")
    analytics.answers["GetExport"] = export_pb.GetExportResponse(export=failed)
    told = await aiaas.run("exports", "download", "export_1", "--to", str(aiaas.folder / "failed.csv"))
    assert (told.code, "NO_STORAGE" in told.err) == (1, True)


async def test_plan_is_shown_and_just_that_plan_applied(aiaas: CommandLine, identity: PeerDouble) -> None:
    planned = configuration_pb.PlanConfigurationResponse()
    planned.plan.changes.add(resource_type="role", resource_name="Auditor")
    planned.plan.fingerprint, planned.plan.text = "f1", "+ role Auditor"
    identity.answers["PlanConfiguration"] = planned
    document = aiaas.folder / "acme.yaml"
    document.write_text("version: 1\n")
    unconfirmed = await aiaas.run("config", "apply", str(document))
    assert (unconfirmed.code, unconfirmed.out) == (2, "+ role Auditor\n")
    assert [call.rpc for call in identity.received] == ["PlanConfiguration"]
    applied = await aiaas.run("config", "apply", str(document), "--yes")
    assert applied.code == 0, applied.err
    assert identity.received[-1].rpc == "ApplyConfiguration"
    assert (identity.received[-1].request.document, identity.received[-1].request.fingerprint) == ("version: 1\n", "f1")
    wrong = configuration_pb.PlanConfigurationResponse()
    wrong.plan.problems.add(path="roles[0]", line=3, message="is unknown")
    identity.answers["PlanConfiguration"] = wrong
    refused = await aiaas.run("config", "plan", str(document))
    assert (refused.code, "line 3, roles[0]: is unknown" in refused.err) == (1, True)
