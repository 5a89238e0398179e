"""Reads a client's JSON body once: known fields only, the deciding ones typed; it never judges what an engine judges.

Each endpoint has a struct that is its allowlist: what vLLM and OpenAI document and what is safe to hand on. Fields that
OpenAI's clients send and engines do not know are accepted and dropped. Fields that only mean something to a single
engine process (stored responses, for example) are refused, since the next request may be answered by another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from aiaas.router.v1.backend_service_pb2 import ENGINE_KIND_LLAMACPP, ENGINE_KIND_VLLM
from aiaas.type.v1.usage_event_pb2 import Endpoint
from mesh.errors import PlatformError, Reason

DEPTH = 64
"""Levels of nesting that a body may have."""

_BYTES_PER_TOKEN = 4
# What a request is taken to produce that does not say how much it wants.
_COMPLETION_TOKENS = 256

_Choices = Annotated[int, Meta(ge=1, le=16)]
_Logprobs = Annotated[int, Meta(ge=0, le=20)]
_Tokens = Annotated[int, Meta(ge=0)]
_Stop = str | Annotated[list[str], Meta(max_length=16)]
_Json = dict[str, Any]


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class _ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[_Json] | UnsetType | None = UNSET
    name: str | UnsetType | None = UNSET
    tool_calls: list[_Json] | UnsetType | None = UNSET
    tool_call_id: str | UnsetType | None = UNSET
    function_call: _Json | UnsetType | None = UNSET
    refusal: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    audio: _Json | UnsetType | None = UNSET
    annotations: list[_Json] | UnsetType | None = UNSET


class _Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What every endpoint knows; None is a field that is not sent on. Those of `dropped` are OpenAI's, and mean nothing
    to an engine."""

    dropped: ClassVar[tuple[str, ...]] = (
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    )

    model: str
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class _Sampling(_Request, kw_only=True):
    """What chat completions and completions share."""

    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: _Choices | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: _Stop | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    max_tokens: _Tokens | None = None
    min_tokens: _Tokens | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: _Logprobs | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    response_format: _Json | None = None
    structured_outputs: _Json | None = None
    guided_json: str | _Json | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class _ChatRequest(_Sampling, kw_only=True):
    dropped: ClassVar[tuple[str, ...]] = (*_Request.dropped, "verbosity")

    messages: Annotated[list[_ChatMessage], Meta(min_length=1)]
    max_completion_tokens: _Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: _Logprobs | None = None
    tools: list[_Json] | None = None
    tool_choice: str | _Json | None = None
    parallel_tool_calls: bool | None = None
    functions: list[_Json] | None = None
    function_call: str | _Json | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: _Json | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    verbosity: str | None = None


class _CompletionRequest(_Sampling, kw_only=True):
    prompt: str | list[Raw]
    suffix: str | None = None
    echo: bool | None = None
    best_of: _Choices | None = None
    logprobs: _Logprobs | None = None


class _EmbeddingRequest(_Request, kw_only=True):
    input: str | list[Raw]
    encoding_format: str | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None


class _ResponseRequest(_Request, kw_only=True):
    dropped: ClassVar[tuple[str, ...]] = (*_Request.dropped, "stream_options")

    input: str | list[_Json]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    top_logprobs: _Logprobs | None = None
    max_output_tokens: _Tokens | None = None
    max_tool_calls: int | None = None
    tools: list[_Json] | None = None
    tool_choice: str | _Json | None = None
    parallel_tool_calls: bool | None = None
    text: _Json | None = None
    reasoning: _Json | None = None
    truncation: str | None = None
    include: list[str] | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | _Json | None = None
    prompt: _Json | None = None


# Long enough to tell conversations apart, and short enough that one conversation's turns all begin with it.
_PREFIX_BYTES = 1024

_PATHS: Mapping[int, str] = {
    Endpoint.ENDPOINT_CHAT_COMPLETIONS: "/v1/chat/completions",
    Endpoint.ENDPOINT_COMPLETIONS: "/v1/completions",
    Endpoint.ENDPOINT_EMBEDDINGS: "/v1/embeddings",
    Endpoint.ENDPOINT_RESPONSES: "/v1/responses",
}
_DECODERS: dict[int, msgspec.json.Decoder[Any]] = {
    Endpoint.ENDPOINT_CHAT_COMPLETIONS: msgspec.json.Decoder(_ChatRequest),
    Endpoint.ENDPOINT_COMPLETIONS: msgspec.json.Decoder(_CompletionRequest),
    Endpoint.ENDPOINT_EMBEDDINGS: msgspec.json.Decoder(_EmbeddingRequest),
    Endpoint.ENDPOINT_RESPONSES: msgspec.json.Decoder(_ResponseRequest),
}
_ENCODER = msgspec.json.Encoder()

# Fields of a stateful API: what they refer to lies in one engine process, if at all, and belongs to no organization.
_STATEFUL = ("background", "previous_response_id", "conversation", "prompt")


class ParsedRequest(msgspec.Struct, frozen=True):
    """A body that was read: what the router decides on, and what goes on to an engine.

    `wants_usage` is whether the client wants to have the usage of a stream at its end, `wants_interim_usage` beside
    every text as well. `estimated_tokens` is about how many tokens it uses, with its prompt. `completion_tokens` is how
    many it wants of each of its `choices` at most, None where it leaves that to the engine; `prompts` is how many it
    holds, `has_media` whether bytes of the body say nothing of their tokens. `cache_key` is what the client says that
    prompts with a common beginning share.
    """

    endpoint: int
    model: str
    stream: bool
    wants_usage: bool
    wants_interim_usage: bool
    estimated_tokens: int
    completion_tokens: int | None
    prompts: int
    choices: int
    has_media: bool
    request: _Request
    cache_key: str | None = None

    @property
    def path(self) -> str:
        """The engine's path."""
        return _PATHS[self.endpoint]

    @property
    def prompt_choices(self) -> int:
        """How many answers each prompt has."""
        return (self.request.n or 1) if isinstance(self.request, _Sampling) else 1

    @property
    def prefix(self) -> bytes:
        """How its prompt begins, or what the client says that its prompts share; empty where no engine keeps a prefix.

        Requests with the same do well on the same backend, which has computed it before.
        """
        request = self.request
        if self.cache_key:
            return self.cache_key.encode()
        match request:
            case _ChatRequest():
                return _ENCODER.encode(request.messages)[:_PREFIX_BYTES]
            case _CompletionRequest():
                return _ENCODER.encode(request.prompt)[:_PREFIX_BYTES]
            case _ResponseRequest():
                return _ENCODER.encode([request.instructions, request.input])[:_PREFIX_BYTES]
        return b""

    def strips_interim_usage(self, engine: int) -> bool:
        """Whether an engine of this kind tells usage beside every text, and the client did not ask for that."""
        return engine == ENGINE_KIND_VLLM and not self.wants_interim_usage

    def shorten(self, completion_tokens: int) -> None:
        """Have the engine end each choice after so many tokens."""
        request = self.request
        if isinstance(request, _ResponseRequest):
            request.max_output_tokens = completion_tokens
        elif isinstance(request, _Sampling):
            request.max_tokens = completion_tokens
            if isinstance(request, _ChatRequest):
                request.max_completion_tokens = None

    def upstream_body(self, upstream_model: str, engine: int) -> bytes:
        """The JSON body for an engine of this kind that knows the model as `upstream_model`. It is asked to tell with
        every piece of a stream what has been used so far."""
        request = self.request
        request.model = upstream_model
        if not self.stream or not isinstance(request, _Sampling):
            return _ENCODER.encode(request)
        is_vllm = engine == ENGINE_KIND_VLLM
        request.stream_options = _StreamOptions(include_usage=True, continuous_usage_stats=is_vllm or None)
        body = _ENCODER.encode(request)
        # Only its timings tell it of llama.cpp, which are no client's to ask for.
        return body[:-1] + b',"timings_per_token":true}' if engine == ENGINE_KIND_LLAMACPP else body


def parse(endpoint: int, body: bytes) -> ParsedRequest:
    """Read the body of a request to `endpoint`.

    Raises PlatformError: UNIMPLEMENTED for an endpoint that is not served, INVALID_JSON, UNKNOWN_FIELD and
    INVALID_ARGUMENT, the latter two naming the field as OpenAI does, for example "messages.0.role".
    """
    decoder = _DECODERS.get(endpoint)
    if decoder is None:
        raise PlatformError(Reason.UNIMPLEMENTED)
    try:
        request: _Request = decoder.decode(body)
    except msgspec.ValidationError as error:
        _check_depth(body)
        raise _invalid_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise PlatformError(Reason.INVALID_JSON) from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(body)
    cache_key = request.prompt_cache_key
    for name in request.dropped:
        setattr(request, name, None)
    stream = False
    wants_usage = wants_interim_usage = True
    has_media = False
    if isinstance(request, _Sampling):
        stream = request.stream is True
        wants_usage, wants_interim_usage = _wanted_usage(request)
    if isinstance(request, _ChatRequest):
        for index, message in enumerate(request.messages):
            if not isinstance(message.content, str):
                has_media |= _check_media(message.content, f"messages.{index}.content")
    if isinstance(request, _ResponseRequest):
        stream = request.stream is True
        for name in _STATEFUL:
            if getattr(request, name):
                raise _invalid(name, f"'{name}' is not supported: responses are not stored.")
            setattr(request, name, None)
        # An engine may store by default what any caller could then read.
        request.store = False
        has_media = _check_media(request.input, "input")
    prompts = _prompts(request)
    completion_tokens, choices = _completion(request, prompts)
    return ParsedRequest(
        endpoint=endpoint,
        model=request.model,
        stream=stream,
        wants_usage=wants_usage,
        wants_interim_usage=wants_interim_usage,
        estimated_tokens=estimate_tokens(body)
        + choices * (_COMPLETION_TOKENS if completion_tokens is None else completion_tokens),
        completion_tokens=completion_tokens,
        prompts=prompts,
        choices=choices,
        has_media=has_media,
        request=request,
        cache_key=cache_key,
    )


def estimate_tokens(body: bytes) -> int:
    """About how many tokens a prompt has."""
    return len(body) // _BYTES_PER_TOKEN


def _completion(request: _Request, prompts: int) -> tuple[int | None, int]:
    """How many tokens each choice may have, None where the engine decides, and how many choices there are."""
    # An engine may take 0 for no limit.
    if isinstance(request, _ChatRequest):
        return request.max_completion_tokens or request.max_tokens or None, request.n or 1
    if isinstance(request, _CompletionRequest):
        return request.max_tokens or None, prompts * max(request.n or 1, request.best_of or 1)
    if isinstance(request, _ResponseRequest):
        return request.max_output_tokens or None, 1
    return 0, 1


def _prompts(request: _Request) -> int:
    """How many prompts a request holds; a list of token ids is one."""
    if isinstance(request, _CompletionRequest):
        prompt = request.prompt
    elif isinstance(request, _EmbeddingRequest):
        prompt = request.input
    else:
        return 1
    return len(prompt) if isinstance(prompt, list) and not _is_tokens(prompt) else 1


def _is_tokens(prompt: list[Raw]) -> bool:
    """Whether a list is one prompt of token ids, and not several prompts."""
    return bool(prompt) and bytes(prompt[0])[:1] not in (b'"', b"[")


def _wanted_usage(request: _Sampling) -> tuple[bool, bool]:
    """Whether the client wants to have usage, and whether beside every text of a stream as well."""
    options = request.stream_options
    if not request.stream:
        if options is not None:
            raise _invalid("stream_options", "'stream_options' is only allowed when 'stream' is true.")
        return True, True
    if options is None or not options.include_usage:
        return False, False
    return True, options.continuous_usage_stats is True


def _check_media(value: Any, place: str) -> bool:
    """Whether there are pictures or the like. Refuses addresses that would make an engine fetch something for a client;
    media come as data URLs."""
    if isinstance(value, list):
        # All of them, since one that is wrong may come after a picture.
        found = [_check_media(item, f"{place}.{index}") for index, item in enumerate(value)]
        return any(found)
    if not isinstance(value, dict):
        return False
    has_media = False
    for name, item in value.items():
        inner = f"{place}.{name}"
        if not name.endswith("_url"):
            has_media |= name.endswith("_audio") or _check_media(item, inner)
            continue
        if isinstance(item, dict):
            inner, item = f"{inner}.url", item.get("url")
        if item is not None and not (isinstance(item, str) and item.startswith("data:")):
            raise _invalid(inner, f"'{inner}' must be a data URL.")
        has_media = True
    return has_media


_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= DEPTH:
        return
    brackets = _STRINGS.sub(b"", body).translate(_TO_SQUARE, _NOT_BRACKETS)
    for _ in range(DEPTH):
        # Each pass takes the innermost level off everywhere.
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return
    raise _too_deep()


def _too_deep() -> PlatformError:
    return PlatformError(Reason.INVALID_JSON, description=f"The JSON body is nested more than {DEPTH} levels deep.")


_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_TYPES = re.compile(r"Expected `([^`]*)`, got `([^`]*)`")
_LIMITS = re.compile(r"Expected `([^`]*)` (of length )?([<>]=) ([0-9.]+)")
_PLAIN = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_BOUNDS = {">=": "at least", "<=": "at most"}


def _invalid_field(text: str) -> PlatformError:
    """msgspec's sentence, "... - at `$.messages[0].role`", as an error that names the field as OpenAI does."""
    text, _, path = text.partition(" - at `$")
    # A key of a map has no name in the path: "[...]".
    place = re.sub(r"\[(\d+)\]", r".\1", path.rstrip("`").replace("[...]", "")).strip(".")
    if unknown := _UNKNOWN.fullmatch(text):
        return PlatformError(Reason.UNKNOWN_FIELD, field=_join(place, unknown[1]))
    if missing := _MISSING.fullmatch(text):
        field = _join(place, missing[1])
        return _invalid(field, f"Missing required parameter: '{field}'.")
    if not place:
        return PlatformError(Reason.INVALID_ARGUMENT, description="The body must be a JSON object.")
    if types := _TYPES.fullmatch(text):
        expected, got = (" or ".join(_PLAIN.get(kind, kind) for kind in types[i].split(" | ")) for i in (1, 2))
        return _invalid(place, f"Invalid type for '{place}': expected {expected}, but got {got} instead.")
    if limits := _LIMITS.fullmatch(text):
        what = "a length of " if limits[2] else ""
        return _invalid(place, f"Invalid value for '{place}': expected {what}{_BOUNDS[limits[3]]} {limits[4]}.")
    return _invalid(place, f"Invalid value for '{place}'.")


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _invalid(field: str, description: str) -> PlatformError:
    return PlatformError(Reason.INVALID_ARGUMENT, field=field, description=description)
