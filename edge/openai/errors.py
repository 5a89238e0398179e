"""How the OpenAI-compatible API words an error, and the headers of its answers; it never decides what an error is."""

import msgspec

from mesh.errors import to_openai

_VERSION = (b"openai-version", b"2020-10-01")


def error_body(error: BaseException) -> bytes:
    """The error as OpenAI's JSON: message, type, param and code, all four always there."""
    return msgspec.json.encode(to_openai(error))


def common_headers(elapsed_s: float) -> list[tuple[bytes, bytes]]:
    """What every answer under /v1 carries; processing time in whole milliseconds, at least 1."""
    return [_VERSION, (b"openai-processing-ms", str(max(1, round(elapsed_s * 1000))).encode("ascii"))]
