"""Text from the command line, as JSON."""

import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from cli import values
from cli.errors import Refused, UsageProblem, refusal
from cli.profiles import Profile, Profiles
from cli.session import Session, read_secret, write_secret


def converted(kind: click.ParamType[Any], text: str) -> Any:
    return kind.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2030-01-31", "2030-01-31T00:00:00.000000Z"),
        ("2030-01-31T12:00:00Z", "2030-01-31T12:00:00.000000Z"),
        ("2030-01-31T12:00:00+02:00", "2030-01-31T10:00:00.000000Z"),
    ],
)
def test_times_become_rfc_3339_in_utc(text: str, expected: str) -> None:
    assert converted(values.Time("TIME"), text) == expected


@pytest.mark.parametrize(
    ("text", "distance"), [("now", timedelta()), ("-7d", timedelta(days=-7)), ("+2h", timedelta(hours=2))]
)
def test_times_may_be_told_from_now(text: str, distance: timedelta) -> None:
    told = datetime.fromisoformat(converted(values.Time("TIME"), text))
    assert abs(told - datetime.now(UTC) - distance) < timedelta(seconds=10)


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", "90s"), ("15m", "900s"), ("12h", "43200s"), ("7d", "604800s"), ("0.5s", "0.5s")]
)
def test_durations_become_seconds(text: str, expected: str) -> None:
    assert converted(values.Duration("DURATION"), text) == expected


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (values.Time("TIME"), "yesterday"),
        (values.Duration("DURATION"), "soon"),
        (values.Object("OBJECT"), "{"),
        (values.Pair("NAME=VALUE"), "name"),
        (values.Choice(("a", "b"), "KIND_"), "c"),
        (values.Text("TEXT"), "@/nowhere/at/all"),
    ],
)
def test_what_cannot_be_meant_is_refused(kind: click.ParamType[Any], text: str) -> None:
    with pytest.raises(click.BadParameter):
        converted(kind, text)


def test_choices_are_taken_by_short_and_by_whole_name() -> None:
    kind = values.Choice(("very-well", "ill"), "MOOD_")
    assert {converted(kind, text) for text in ("very-well", "VERY_WELL", "MOOD_VERY_WELL")} == {"MOOD_VERY_WELL"}


def test_objects_are_json_or_pairs_and_text_may_be_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.rego"
    path.write_text("package x\n")
    assert converted(values.Object("OBJECT"), '{"a": 1}') == {"a": 1}
    assert converted(values.Object("OBJECT"), "model_id=a,upstream_model=b") == {"model_id": "a", "upstream_model": "b"}
    assert converted(values.Text("TEXT"), f"@{path}") == "package x\n"
    assert converted(values.Text("TEXT"), "@@ada") == "@ada"


def test_secret_is_read_from_a_file_and_written_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_secret(str(path), "aias_secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_secret(str(path), "Key") == "aias_secret"
    with pytest.raises(UsageProblem):
        write_secret(str(path), "another")
    empty = tmp_path / "empty"
    empty.write_text("\n")
    with pytest.raises(UsageProblem, match="is empty"):
        read_secret(str(empty), "Key")


def test_profiles_are_readable_by_their_owner_alone_and_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "of" / "profiles.json"
    path.parent.mkdir()
    path.write_text("{}")
    path.chmod(0o644)
    with Profiles(path).changing() as first:
        first.all["default"] = Profile("https://aiaas.example", "org_1", "aias_secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Profiles(path).all == first.all
    assert sorted(each.name for each in path.parent.iterdir()) == ["profiles.json", "profiles.lock"]
    assert "aias_secret" not in repr(first.all)


def test_damaged_file_of_profiles_is_told(tmp_path: Path) -> None:
    path = tmp_path / "profiles.json"
    path.write_text("{")
    with pytest.raises(UsageProblem, match=re.escape(str(path))):
        Profiles(path)


def test_option_before_environment_before_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profiles.json"
    with Profiles(path).changing() as profiles:
        profiles.all["default"] = Profile("https://profile.example/", "org_profile", "of the profile")
    token = tmp_path / "token"
    token.write_text("of a file")
    plain = Session(path=path)
    assert (plain.base_url, plain.organization(), plain.credential()) == (
        "https://profile.example",
        "org_profile",
        "of the profile",
    )
    monkeypatch.setenv("AIAAS_TOKEN", "of the environment")
    assert plain.credential() == "of the environment"
    told = Session(url="https://other.example", organization_id="org_1", token_file=str(token), path=path)
    assert (told.base_url, told.organization(), told.credential()) == ("https://other.example", "org_1", "of a file")


def test_credential_of_a_profile_is_for_its_platform_alone(tmp_path: Path) -> None:
    path = tmp_path / "profiles.json"
    with Profiles(path).changing() as profiles:
        profiles.all["default"] = Profile("https://profile.example", token="of the profile")
    assert Session(url="https://profile.example/", path=path).credential() == "of the profile"
    assert Session(url="https://other.example", path=path).credential() == ""


def test_commands_that_change_profiles_at_one_moment_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "profiles.json"
    early = Profiles(path)
    with Profiles(path).changing() as profiles:
        profiles.all["first"] = Profile(token="one")
    with early.changing() as profiles:
        profiles.all["second"] = Profile(token="two")
    assert {name: each.token for name, each in Profiles(path).all.items()} == {"first": "one", "second": "two"}


@pytest.mark.parametrize(
    ("status", "code"), [(400, 1), (401, 1), (403, 1), (404, 1), (409, 1), (501, 1), (429, 3), (500, 3), (503, 3)]
)
def test_exit_code_tells_whether_another_try_makes_sense(status: int, code: int) -> None:
    assert refusal(status, {}, {}).exit_code == code


def test_errors_of_all_three_apis_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    details = [
        {"@type": "ErrorInfo", "reason": "INVALID_ARGUMENT"},
        {"@type": "BadRequest", "fieldViolations": [{"field": "api_key.display_name", "description": "is too long"}]},
    ]
    headers = {"x-request-id": "req_1", "retry-after": "7"}
    refusal(400, headers, {"error": {"code": 400, "message": "No.", "details": details}}).show()
    said = capsys.readouterr().err
    for expected in ("Error: No.", "INVALID_ARGUMENT", "api_key.display_name: is too long", "req_1", "7 s"):
        assert expected in said
    openai = refusal(404, headers, {"error": {"message": "No model.", "code": "model_not_found", "param": "model"}})
    assert (openai.reason, list(openai.fields)) == ("model_not_found", ["model"])
    oauth = refusal(400, headers, {"error": "invalid_grant", "error_description": "Used."})
    assert (oauth.reason, oauth.message) == ("invalid_grant", "Used.")
    assert isinstance(refusal(502, {}, None), Refused)
