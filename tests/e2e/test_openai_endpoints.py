"""Completions, embeddings, responses and models through the official client, against real engines."""

import base64
import json
import struct
from typing import Any

import pytest
from openai import NotFoundError

from .conftest import Platform

MODEL = "smollm2"
EMBEDDER = "minilm"


def test_completion_answers_with_text_and_usage(openai: Any) -> None:
    answer = openai.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.usage.completion_tokens <= 8


def test_streamed_completion_has_the_same_text_as_the_whole_one(openai: Any) -> None:
    request = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    whole = openai.completions.create(**request).choices[0].text
    chunks = list(openai.completions.create(**request, stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole
    assert all(chunk.usage is None for chunk in chunks)


def test_streamed_completion_tells_usage_when_asked(openai: Any) -> None:
    chunks = list(
        openai.completions.create(
            model=MODEL, prompt="Hello", max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens > 0


def test_embedding_has_the_models_dimensions_and_length_one(openai: Any) -> None:
    answer = openai.embeddings.create(model=EMBEDDER, input="The cat sat.", encoding_format="float")
    vector = answer.data[0].embedding
    assert len(vector) == 384
    assert sum(value * value for value in vector) == pytest.approx(1, abs=0.01)
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens


def test_embeddings_keep_the_order_of_their_inputs_and_their_meaning(openai: Any) -> None:
    inputs = ["A cat sat on the mat.", "A kitten rested on a rug.", "Interest rates rose in March."]
    answer = openai.embeddings.create(model=EMBEDDER, input=inputs, encoding_format="float")
    assert [item.index for item in answer.data] == [0, 1, 2]
    cat, kitten, rates = (item.embedding for item in answer.data)

    def likeness(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert likeness(cat, kitten) > likeness(cat, rates) + 0.2


def test_base64_embedding_is_the_float_embedding(openai: Any) -> None:
    floats = openai.embeddings.create(model=EMBEDDER, input="Same.", encoding_format="float").data[0].embedding
    encoded = openai.embeddings.create(model=EMBEDDER, input="Same.", encoding_format="base64").data[0].embedding
    decoded = struct.unpack(f"<{len(floats)}f", base64.b64decode(encoded))
    assert list(decoded) == pytest.approx(floats, abs=1e-4)


def test_default_embedding_encoding_of_the_client_is_understood(openai: Any) -> None:
    assert len(openai.embeddings.create(model=EMBEDDER, input="Default.").data[0].embedding) == 384


def test_response_answers_with_output_text_and_usage(openai: Any) -> None:
    answer = openai.responses.create(model=MODEL, input="Say hello.", max_output_tokens=16, temperature=0)
    assert answer.object == "response"
    assert answer.output_text
    assert answer.usage.output_tokens > 0


def test_streamed_response_is_typed_events_ended_by_completion(openai: Any) -> None:
    events = list(
        openai.responses.create(model=MODEL, input="Say hello.", max_output_tokens=16, temperature=0, stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert events[-1].response.usage.output_tokens > 0


def test_models_lists_what_is_served(openai: Any) -> None:
    models = {model.id: model for model in openai.models.list()}
    assert {MODEL, EMBEDDER} <= set(models)
    assert models[MODEL].object == "model"
    assert models[MODEL].created > 0


def test_model_is_found_by_its_id(openai: Any) -> None:
    assert openai.models.retrieve(MODEL).id == MODEL


def test_unknown_model_is_not_found(openai: Any) -> None:
    with pytest.raises(NotFoundError) as error:
        openai.models.retrieve("no/such-model")
    assert error.value.code == "model_not_found"


def test_key_sees_and_uses_only_its_models(platform: Platform) -> None:
    tenant = platform.new_tenant("Narrow")
    with platform.admin as admin:
        key = admin.post(
            f"/admin/v1/organizations/{tenant.organization_id}/api-keys",
            json={"display_name": "Embeddings only", "allowed_models": [EMBEDDER]},
        ).json()
    client = platform.client(key["secret"])
    assert [model.id for model in client.models.list()] == [EMBEDDER]
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=1)


def test_answer_of_the_wire_is_plain_json(openai: Any) -> None:
    raw = openai.completions.with_raw_response.create(model=MODEL, prompt="Hi", max_tokens=1)
    assert raw.headers["content-type"].startswith("application/json")
    assert json.loads(raw.text)["choices"]
