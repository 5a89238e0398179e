"""Server-sent events of the edge's own: the one that tells of an error in mid-stream; it never parses any."""

from aiaas.type.v1 import usage_event_pb2
from edge.openai.errors import error_body
from mesh.errors import PlatformError

EVENT_END = b"\n\n"


def error_event(endpoint: usage_event_pb2.Endpoint.ValueType, error: PlatformError, last_chunk: bytes) -> bytes:
    r"""The event after which the stream ends without "[DONE]", as OpenAI's clients look for it.

    `last_chunk` is what was sent before: if it broke off within an event, that event is ended first. The Responses API
    names its events and has the type within the data as well.
    """
    before = b"" if not last_chunk or last_chunk.endswith((EVENT_END, b"\r\n\r\n")) else EVENT_END
    body = error_body(error)
    if endpoint == usage_event_pb2.ENDPOINT_RESPONSES:
        return before + b'event: error\ndata: {"type":"error",' + body[1:] + EVENT_END
    return before + b"data: " + body + EVENT_END
