"""Frames leave in batches: at once after a pause, then at most once in a window, never too many bytes together."""

import asyncio

from mesh.relay import BATCH_BYTES, WINDOW_S, Outbox


async def test_frames_of_one_moment_travel_together_and_in_order() -> None:
    outbox = Outbox()
    outbox.add(1).head.model = "m"
    outbox.add_data(1, b"a")
    outbox.add_data(2, b"b")
    batch = await anext(outbox.batches())
    assert [(frame.inference_id, frame.WhichOneof("kind")) for frame in batch.frames] == [
        (1, "head"),
        (1, "data"),
        (2, "data"),
    ]


async def test_second_batch_waits_for_its_window_and_gathers() -> None:
    loop = asyncio.get_running_loop()
    outbox = Outbox()
    batches = outbox.batches()
    outbox.add_data(1, b"a")
    began = loop.time()
    await anext(batches)
    outbox.add_data(1, b"b")
    following = asyncio.ensure_future(anext(batches))
    await asyncio.sleep(0)
    outbox.add_data(1, b"c")
    batch = await following
    assert [frame.data for frame in batch.frames] == [b"b", b"c"]
    assert loop.time() - began >= WINDOW_S


async def test_batch_that_is_full_is_closed_and_none_is_lost() -> None:
    outbox = Outbox(window_s=0)
    pieces = [bytes([index]) * (BATCH_BYTES // 2) for index in range(5)]
    for piece in pieces:
        outbox.add_data(1, piece)
    outbox.add(1).tail.finish_reason = "stop"
    outbox.close()
    batches = [batch async for batch in outbox.batches()]
    assert max(batch.ByteSize() for batch in batches) < 2 * BATCH_BYTES
    frames = [frame for batch in batches for frame in batch.frames]
    assert [frame.data for frame in frames[:-1]] == pieces
    assert frames[-1].WhichOneof("kind") == "tail"


async def test_frame_without_bytes_wakes_the_reader() -> None:
    outbox = Outbox(window_s=0)
    following = asyncio.ensure_future(anext(outbox.batches()))
    await asyncio.sleep(0)
    outbox.add(0).ping.SetInParent()
    assert (await following).frames[0].WhichOneof("kind") == "ping"


async def test_closed_outbox_ends_for_whoever_waits() -> None:
    outbox = Outbox()

    async def read() -> list[object]:
        return [batch async for batch in outbox.batches()]

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    outbox.close()
    assert await reading == []
