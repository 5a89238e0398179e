"""Configuration from the environment: read once, checked completely."""

from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from mesh.config import ConfigError, describe, load, setting, show


@dataclass(frozen=True)
class Config:
    database_url: str = setting("T_DATABASE_URL", "PostgreSQL", secret=True)
    name: str = setting("T_NAME", "the name of the replica", default="one")
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = setting("T_PORT", "gRPC port", default=7002)
    ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = setting("T_RATIO", "share of traces", default=0.1)
    reflection: bool = setting("T_REFLECTION", "whether reflection answers", default=True)
    peers: tuple[str, ...] = setting("T_PEERS", "addresses of peers", default=())
    engine: Literal["llamacpp", "vllm"] = setting("T_ENGINE", "the engine", default="llamacpp")
    endpoint: str | None = setting("T_ENDPOINT", "where traces go", default=None)


URL = "postgresql://u:hunter2@db/x"


def test_every_type_is_read() -> None:
    config = load(
        Config,
        {
            "T_DATABASE_URL": URL,
            "T_PORT": " 80 ",
            "T_RATIO": "1",
            "T_REFLECTION": "false",
            "T_PEERS": "a:1, b:2,",
            "T_ENGINE": "vllm",
            "T_ENDPOINT": "http://otel:4317",
            "UNRELATED": "x",
        },
    )
    assert config == Config(
        database_url=URL,
        port=80,
        ratio=1.0,
        reflection=False,
        peers=("a:1", "b:2"),
        engine="vllm",
        endpoint="http://otel:4317",
    )


def test_defaults_hold_where_nothing_or_nothing_but_space_is_set() -> None:
    config = load(Config, {"T_DATABASE_URL": URL, "T_PORT": "", "T_NAME": "  "})
    assert (config.port, config.name) == (7002, "one")


def test_every_wrong_variable_is_named_with_what_it_wants() -> None:
    environ = {"T_PORT": "70000", "T_RATIO": "half", "T_REFLECTION": "perhaps", "T_ENGINE": "tgi"}
    with pytest.raises(ConfigError) as raised:
        load(Config, environ)
    assert [str(problem) for problem in raised.value.problems] == [
        "T_DATABASE_URL wants text: it is not set (PostgreSQL)",
        "T_PORT wants an integer, at least 1, at most 65535: it is '70000'",
        "T_RATIO wants a number, at least 0, at most 1: it is 'half'",
        "T_REFLECTION wants true or false: it is 'perhaps'",
        "T_ENGINE wants one of llamacpp, vllm: it is 'tgi'",
    ]
    assert str(raised.value).count("\n") == 4


def test_a_secrets_value_is_never_told() -> None:
    @dataclass(frozen=True)
    class Keys:
        pin: int = setting("T_PIN", "a pin", secret=True)

    with pytest.raises(ConfigError) as raised:
        load(Keys, {"T_PIN": "hunter2"})
    assert "T_PIN wants an integer" in str(raised.value)
    assert "hunter2" not in str(raised.value)

    config = load(Config, {"T_DATABASE_URL": URL})
    assert "hunter2" not in repr(config)
    assert ("T_DATABASE_URL", "********") in show(config)
    assert "hunter2" not in str(show(config))


def test_a_secret_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f"{URL}\n")
    assert load(Config, {"T_DATABASE_URL_FILE": str(file)}).database_url == URL
    # What is no secret is in the environment alone.
    assert load(Config, {"T_DATABASE_URL": URL, "T_NAME_FILE": str(file)}).name == "one"


def test_a_secrets_file_that_is_of_no_use_is_named_and_never_told(tmp_path: Path) -> None:
    file = tmp_path / "url"
    for environ, wrong in (
        ({"T_DATABASE_URL_FILE": str(file)}, f"{file}: No such file or directory"),
        ({"T_DATABASE_URL_FILE": str(file), "T_DATABASE_URL": URL}, "T_DATABASE_URL is set as well"),
        ({"T_DATABASE_URL_FILE": str(tmp_path)}, f"{tmp_path}: Is a directory"),
    ):
        with pytest.raises(ConfigError) as raised:
            load(Config, environ)
        assert str(raised.value) == f"T_DATABASE_URL_FILE wants the path of a file: {wrong}"
    file.write_bytes(b"hunter2\xff")
    with pytest.raises(ConfigError, match="it is not UTF-8") as raised:
        load(Config, {"T_DATABASE_URL_FILE": str(file)})
    assert "hunter2" not in str(raised.value)


def test_a_rule_between_variables_is_a_configuration_error() -> None:
    @dataclass(frozen=True)
    class Range:
        low: int = setting("T_LOW", "least", default=1)
        high: int = setting("T_HIGH", "most", default=2)

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("T_LOW is above T_HIGH")

    with pytest.raises(ConfigError, match="T_LOW is above T_HIGH"):
        load(Range, {"T_LOW": "3"})


def test_a_configuration_cannot_be_changed() -> None:
    config = load(Config, {"T_DATABASE_URL": URL})
    with pytest.raises(FrozenInstanceError):
        config.port = 1  # type: ignore[misc]


def test_variables_describe_themselves() -> None:
    rows = {row.variable: row for row in describe(Config)}
    assert list(rows)[:3] == ["T_DATABASE_URL", "T_NAME", "T_PORT"]
    assert rows["T_DATABASE_URL"] == ("T_DATABASE_URL", "text", "required", "PostgreSQL", True)
    assert rows["T_PORT"] == ("T_PORT", "an integer, at least 1, at most 65535", "7002", "gRPC port", False)
    assert rows["T_REFLECTION"].default == "true"
    assert rows["T_PEERS"].type == "a comma-separated list"
    assert rows["T_ENDPOINT"][1:3] == ("text", "")


def test_values_are_shown_as_they_would_be_written() -> None:
    shown = dict(show(load(Config, {"T_DATABASE_URL": URL, "T_PEERS": "a,b"})))
    assert shown["T_PEERS"] == "a,b"
    assert shown["T_REFLECTION"] == "true"
    assert load(Config, shown | {"T_DATABASE_URL": URL}).peers == ("a", "b")
