"""HTTP/1.1 answers byte by byte: what engines and proxies write, and what no one should; it never opens a socket.

Those of llama.cpp and of uvicorn, which vLLM runs on, are as they came off the wire, shortened; the others follow
RFC 9112 or break it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What becomes of an answer when the connection ends after it."""

    COMPLETE = "complete"
    LOST = "connection_lost"
    GARBAGE = "backend_garbage"


@dataclass(frozen=True)
class Recorded:
    """Bytes of an answer, and what they say. `keeps` is whether the connection can be used again after it, as long as
    it has not ended."""

    name: str
    raw: bytes
    status: int = 200
    content_type: str = ""
    body: bytes = b""
    verdict: Verdict = Verdict.COMPLETE
    keeps: bool = True

    def __str__(self) -> str:
        return self.name


def head(status_line: str, *headers: str) -> bytes:
    """A status line and headers."""
    return "".join(f"{line}\r\n" for line in (status_line, *headers, "")).encode("latin-1")


def chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """A chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


OK = "HTTP/1.1 200 OK"
_CHUNKED = "Transfer-Encoding: chunked"
_LLAMA_CPP = ("Server: llama.cpp", "Access-Control-Allow-Origin: ")
_UVICORN = ("date: Mon, 23 Nov 2026 04:18:36 GMT", "server: uvicorn")
_DELTA = (
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"%b"}}],"created":1795407348,"id":'
    b'"chatcmpl-w3","model":"up","system_fingerprint":"b0-unknown","object":"chat.completion.chunk"}\n\n'
)
_LLAMA_CPP_STREAM = (
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],"created":1795407'
    b'348,"id":"chatcmpl-w3","model":"up","object":"chat.completion.chunk"}\n\n' + _DELTA % b"A",
    _DELTA % b"va",
    _DELTA % b",",
    b'data: {"choices":[],"created":1795407348,"id":"chatcmpl-w3","model":"up","object":"chat.completion.chunk",'
    b'"usage":{"completion_tokens":3,"prompt_tokens":33,"total_tokens":36},"timings":{"cache_n":32,"prompt_ms":11.055}}\n\n',
    b"data: [DONE]\n\n",
)
_VLLM_DELTA = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1764000000,"model":"up","choices":[{"index"'
    b':0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":null}]}\n\n'
)
_VLLM_STREAM = (
    _VLLM_DELTA % b"Hel",
    _VLLM_DELTA % b"lo",
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1764000000,"model":"up","choices":[],"usage":'
    b'{"prompt_tokens":5,"total_tokens":7,"completion_tokens":2}}\n\n',
    b"data: [DONE]\n\n",
)
_DOCUMENT = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1764000000,"model":"up","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"Hello"},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":5,'
    b'"total_tokens":6,"completion_tokens":1}}'
)
_NO_MODEL = b'{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":"model","code":404}}'
_NOT_A_LIST = b'{"error":{"code":400,"message":"Expected \'messages\' to be an array"}}'
_PAGE = b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n</html>\r\n"
_BYTES = bytes(range(256)) * 3
_LARGE = bytes(range(256)) * 1200
_JSON = "Content-Type: application/json"


def _of(body: bytes, status_line: str = OK, *headers: str) -> bytes:
    return head(status_line, *headers, f"Content-Length: {len(body)}") + body


GOOD = [
    Recorded(
        "llama.cpp document",
        _of(
            _DOCUMENT,
            OK,
            *_LLAMA_CPP,
            "Content-Type: application/json; charset=utf-8",
            "Keep-Alive: timeout=5, max=100",
        ),
        content_type="application/json",
        body=_DOCUMENT,
    ),
    Recorded(
        "llama.cpp stream",
        head(OK, *_LLAMA_CPP, "X-Accel-Buffering: no", "Content-Type: text/event-stream", _CHUNKED)
        + chunks(*_LLAMA_CPP_STREAM),
        content_type="text/event-stream",
        body=b"".join(_LLAMA_CPP_STREAM),
    ),
    Recorded(
        "llama.cpp stream and close",
        head(OK, *_LLAMA_CPP, "Content-Type: text/event-stream", _CHUNKED, "Connection: close")
        + chunks(*_LLAMA_CPP_STREAM),
        content_type="text/event-stream",
        body=b"".join(_LLAMA_CPP_STREAM),
        keeps=False,
    ),
    Recorded(
        "llama.cpp error",
        _of(_NOT_A_LIST, "HTTP/1.1 400 Bad Request", *_LLAMA_CPP, _JSON, "Connection: close"),
        status=400,
        content_type="application/json",
        body=_NOT_A_LIST,
        keeps=False,
    ),
    Recorded(
        "llama.cpp health",
        _of(b'{"status":"ok"}', OK, *_LLAMA_CPP, _JSON),
        content_type="application/json",
        body=b'{"status":"ok"}',
    ),
    Recorded(
        "vLLM document",
        head(OK, *_UVICORN, f"content-length: {len(_DOCUMENT)}", "content-type: application/json") + _DOCUMENT,
        content_type="application/json",
        body=_DOCUMENT,
    ),
    Recorded(
        "vLLM stream",
        head(OK, *_UVICORN, "content-type: text/event-stream; charset=utf-8", "transfer-encoding: chunked")
        + chunks(*_VLLM_STREAM),
        content_type="text/event-stream",
        body=b"".join(_VLLM_STREAM),
    ),
    Recorded(
        "vLLM error",
        _of(_NO_MODEL, "HTTP/1.1 404 Not Found", *_UVICORN, "content-type: application/json"),
        status=404,
        content_type="application/json",
        body=_NO_MODEL,
    ),
    Recorded("vLLM health", head(OK, *_UVICORN, "content-length: 0")),
    Recorded(
        "proxy's page",
        _of(_PAGE, "HTTP/1.1 502 Bad Gateway", "Server: nginx", "Content-Type: text/html", "Connection: close"),
        status=502,
        content_type="text/html",
        body=_PAGE,
        keeps=False,
    ),
    Recorded(
        "chunks with extensions and trailers",
        head(OK, _CHUNKED, "Trailer: X-Digest")
        + b'5;name=value;quoted="a;b\\"c"\r\nHello\r\n00000F ;x\r\n'.replace(b" ;", b";")
        + b" and a good day\r\n000;last\r\nX-Digest: 1\r\nContent-Type: image/png\r\n\r\n",
        body=b"Hello and a good day",
    ),
    Recorded(
        "chunks of a byte",
        head(OK, _CHUNKED) + chunks(*(bytes([byte]) for byte in _BYTES)),
        body=_BYTES,
    ),
    Recorded("chunks of nothing", head(OK, _CHUNKED) + chunks()),
    Recorded(
        "chunks that look like HTTP", head(OK, _CHUNKED) + chunks(head(OK), chunks(b"x")), body=head(OK) + chunks(b"x")
    ),
    Recorded(
        "close told by a trailer",
        head(OK, _CHUNKED) + chunks(b"{}", end=b"0\r\nConnection: close\r\n\r\n"),
        body=b"{}",
        keeps=False,
    ),
    Recorded("100 before", head("HTTP/1.1 100 Continue") + _of(b"{}", OK, _JSON), 200, "application/json", b"{}"),
    Recorded(
        "103 and 102 before",
        head("HTTP/1.1 103 Early Hints", "Link: </a>; rel=preload", "Content-Type: image/png")
        + head("HTTP/1.1 102 Processing")
        + _of(b"{}"),
        body=b"{}",
    ),
    Recorded(
        "body that the end ends",
        head(OK, "Content-Type: Text/Plain ; x=y") + _BYTES,
        200,
        "text/plain",
        _BYTES,
        keeps=False,
    ),
    Recorded("HTTP/1.0", head("HTTP/1.0 200 OK", _JSON) + b"{}", 200, "application/json", b"{}", keeps=False),
    Recorded("HTTP/1.0 that is counted", _of(b"{}", "HTTP/1.0 200 OK"), body=b"{}", keeps=False),
    Recorded("HTTP/1.0 that is kept", _of(b"{}", "HTTP/1.0 200 OK", "Connection: keep-alive"), body=b"{}"),
    Recorded("204", head("HTTP/1.1 204 No Content"), status=204),
    Recorded("304 with a length", head("HTTP/1.1 304 Not Modified", "Content-Length: 5"), status=304),
    Recorded("no reason phrase", b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\n{}", body=b"{}"),
    Recorded("empty line before", b"\r\n" + _of(b"{}"), body=b"{}"),
    Recorded(
        "odd spelling", b"HTTP/1.1 200 Fine \xe4\r\ncOnTeNt-LeNgTh:   0002  \r\nX:\r\nY: \xff\tz\r\n\r\n{}", body=b"{}"
    ),
    Recorded("large head", _of(b"{}", OK, f"X-Large: {'x' * 60_000}"), body=b"{}"),
    Recorded("large body", _of(_LARGE), body=_LARGE),
    Recorded("large chunks", head(OK, _CHUNKED) + chunks(_LARGE[:200_000], _LARGE[200_000:]), body=_LARGE),
]
"""Answers that are whole."""

SURPLUS = [
    Recorded("bytes after it", _of(b"{}") + b"more", body=b"{}", keeps=False),
    Recorded("second answer after it", _of(b"{}") + _of(b"[]"), body=b"{}", keeps=False),
    Recorded("bytes after its chunks", head(OK, _CHUNKED) + chunks(b"{}") + b"0", body=b"{}", keeps=False),
    Recorded("bytes after the last", _of(b"{}", OK, "Connection: close") + b"more", body=b"{}", keeps=False),
    Recorded("body of a 204", _of(b"{}", "HTTP/1.1 204 No Content"), status=204, keeps=False),
]
"""Answers that are whole, and more than that: no answer could be trusted after them."""


def _cut(name: str, raw: bytes, body: bytes = b"", content_type: str = "") -> Recorded:
    return Recorded(name, raw, 200, content_type, body, Verdict.LOST, keeps=False)


CUT = [
    _cut("nothing", b""),
    _cut("cut in the status line", b"HTTP/1.1 20"),
    _cut("cut in the headers", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"),
    _cut("cut after an interim answer", head("HTTP/1.1 100 Continue")),
    _cut("cut before the body", head(OK, _JSON, "Content-Length: 2"), content_type="application/json"),
    _cut("cut in the body", head(OK, "Content-Length: 3") + b"{}", b"{}"),
    _cut("cut in a chunk", head(OK, _CHUNKED) + b"5\r\nHel", b"Hel"),
    _cut("cut between chunks", head(OK, _CHUNKED) + b"5\r\nHello\r\n", b"Hello"),
    _cut("cut before the last line", head(OK, _CHUNKED) + b"5\r\nHello\r\n0\r\n", b"Hello"),
    _cut("cut in the trailers", head(OK, _CHUNKED) + b"5\r\nHello\r\n0\r\nX-Digest: 1", b"Hello"),
]
"""Answers that the end of the connection breaks off."""


def _garbage(name: str, raw: bytes, body: bytes = b"", status: int = 0) -> Recorded:
    return Recorded(name, raw, status or (200 if body else 0), "", body, Verdict.GARBAGE, keeps=False)


def _garbage_chunks(name: str, raw: bytes, body: bytes = b"") -> Recorded:
    return _garbage(name, head(OK, _CHUNKED) + raw, body, 200)


BROKEN = [
    _garbage("another protocol", b"SSH-2.0-OpenSSH_9.6\r\n"),
    _garbage("a body alone", _DOCUMENT),
    _garbage("HTTP of no version", b"HTTP/1.9 200 OK\r\n\r\n"),
    _garbage("status of two digits", head("HTTP/1.1 20 OK")),
    _garbage("status of four digits", head("HTTP/1.1 2000 OK")),
    _garbage("status below any", _of(b"{}", "HTTP/1.1 099 Odd")),
    _garbage("status above any", _of(b"{}", "HTTP/1.1 600 Odd")),
    _garbage("length and chunks", head(OK, "Content-Length: 12", _CHUNKED) + chunks(b"{}")),
    _garbage("chunks and length", head(OK, _CHUNKED, "Content-Length: 12") + chunks(b"{}")),
    _garbage("two lengths", head(OK, "Content-Length: 2", "Content-Length: 3") + b"{}x"),
    _garbage("the same length twice", head(OK, "Content-Length: 2", "Content-Length: 2") + b"{}"),
    _garbage("list of lengths", head(OK, "Content-Length: 2, 2") + b"{}"),
    _garbage("length with a sign", head(OK, "Content-Length: +2") + b"{}"),
    _garbage("length below nothing", head(OK, "Content-Length: -2") + b"{}"),
    _garbage("length in hex", head(OK, "Content-Length: 0x2") + b"{}"),
    _garbage("no length in its header", head(OK, "Content-Length: ") + b"{}"),
    _garbage("length beyond any", head(OK, f"Content-Length: {'9' * 30}") + b"{}"),
    _garbage("chunks twice", head(OK, _CHUNKED, _CHUNKED) + chunks(b"{}")),
    _garbage("list of chunks", head(OK, "Transfer-Encoding: chunked, chunked") + chunks(b"{}")),
    _garbage("compressed chunks", head(OK, "Transfer-Encoding: gzip, chunked") + chunks(b"{}")),
    _garbage("compressed to the end", head(OK, "Transfer-Encoding: gzip") + b"{}"),
    _garbage("chunks that are not last", head(OK, "Transfer-Encoding: chunked, gzip") + chunks(b"{}")),
    _garbage("coding of no name", head(OK, "Transfer-Encoding: xchunked") + chunks(b"{}")),
    _garbage("coding after a tab", head(OK, "Transfer-Encoding: chunked\t") + chunks(b"{}")),
    _garbage("folded header", head(OK, "X-A: b\r\n c", "Content-Length: 2") + b"{}"),
    _garbage("folded length", head(OK, "Content-Length: 2\r\n 3") + b"{}"),
    _garbage("folded coding", head(OK, "Transfer-Encoding:\r\n chunked") + chunks(b"{}")),
    _garbage("NUL in a value", head(OK, "X-A: b\0c", "Content-Length: 2") + b"{}"),
    _garbage("NUL in a name", head(OK, "X\0A: b", "Content-Length: 2") + b"{}"),
    _garbage("control in a value", head(OK, "X-A: b\x01c", "Content-Length: 2") + b"{}"),
    _garbage("space before the colon", head(OK, "Content-Length : 2") + b"{}"),
    _garbage("no name", head(OK, ": 2", "Content-Length: 2") + b"{}"),
    _garbage("no colon", head(OK, "Content-Length 2") + b"{}"),
    _garbage("space before the first header", head(OK, " X: y", "Content-Length: 2") + b"{}"),
    _garbage("line ends of LF", b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}"),
    _garbage("line end of LF", b"HTTP/1.1 200 OK\r\nContent-Length: 2\n\r\n{}"),
    _garbage("line end of CR", b"HTTP/1.1 200 OK\r\nX-A: b\rContent-Length: 2\r\n\r\n{}"),
    _garbage("switch of protocols", head("HTTP/1.1 101 Switching", "Connection: upgrade", "Upgrade: x") + b"{}"),
    _garbage("switch of protocols unsaid", head("HTTP/1.1 101 Switching") + _of(b"{}")),
    _garbage_chunks("chunk size of nothing", b"\r\n{}\r\n0\r\n\r\n"),
    _garbage_chunks("chunk size with a sign", b"-2\r\n{}\r\n0\r\n\r\n"),
    _garbage_chunks("chunk size in C", b"0x2\r\n{}\r\n0\r\n\r\n"),
    _garbage_chunks("chunk size before a space", b"2 \r\n{}\r\n0\r\n\r\n"),
    _garbage_chunks("chunk size beyond any", b"f" * 17 + b"\r\n{}\r\n0\r\n\r\n"),
    _garbage_chunks("chunk size before LF", b"2\n{}\r\n0\r\n\r\n"),
    _garbage_chunks("chunk extension before LF", b"2;a\n{}\r\n0\r\n\r\n"),
    _garbage_chunks("chunk longer than it said", b"2\r\n{}x\r\n0\r\n\r\n", b"{}"),
    _garbage_chunks("chunk without its end", b"2\r\n{}0\r\n\r\n", b"{}"),
    _garbage_chunks("length in a trailer", chunks(b"{}", end=b"0\r\nContent-Length: 2\r\n\r\n"), b"{}"),
    _garbage_chunks("coding in a trailer", chunks(b"{}", end=b"0\r\nTransfer-Encoding: chunked\r\n\r\n"), b"{}"),
    _garbage("head too long", _of(b"{}", OK, *(f"X-{number}: {'x' * 1000}" for number in range(70)))),
    _garbage("line too long", b"HTTP/1.1 200 OK\r\nX-A: " + b"x" * 70_000),
    _garbage("reason too long", b"HTTP/1.1 200 " + b"x" * 70_000),
    _garbage("interim answers without end", head("HTTP/1.1 103 Early Hints") * 3000),
    _garbage_chunks("chunk size without end", b"0" * 140_000),
    _garbage_chunks("chunk extension without end", b"2;" + b"x" * 140_000),
    _garbage_chunks("trailers without end", chunks(b"{}", end=b"0\r\n" + b"X: y\r\n" * 40_000), b"{}"),
]
"""Answers that are not HTTP, or that two readers could take for different ones."""

ALL = [*GOOD, *SURPLUS, *CUT, *BROKEN]
