"""Answers as people and programs read them."""

import json

import pytest
import yaml

from cli import output
from cli.errors import Failed

ANSWER = {
    "api_keys": [
        {"api_key_id": "key_1", "display_name": "=1+1", "state": "API_KEY_STATE_ACTIVE", "limits": {"rps": 2}},
        {"api_key_id": "key_2", "display_name": "[red]\x1b[31mx", "scopes": ["a", "b"], "cost": "-5"},
    ],
    "next_page_token": "",
}


def written(form: str, capsys: pytest.CaptureFixture[str], **settings: object) -> str:
    output.write(ANSWER, form, rows="api_keys", **settings)  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_json_and_yaml_are_the_answer_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(written("json", capsys)) == ANSWER
    assert yaml.safe_load(written("yaml", capsys)) == ANSWER


def test_csv_has_every_field_and_no_formula(capsys: pytest.CaptureFixture[str]) -> None:
    lines = written("csv", capsys).splitlines()
    assert lines[0] == "api_key_id,display_name,state,limits.rps,scopes,cost"
    assert lines[1].startswith("key_1,'=1+1,API_KEY_STATE_ACTIVE,2,")
    assert lines[2].endswith(',"a,b",-5')


def test_csv_of_nothing_has_the_columns_that_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    output.write({"rows": []}, "csv", rows="rows", columns=["a", "b"])
    assert capsys.readouterr().out == "a,b\n"


def test_table_has_short_names_and_shows_no_markup_and_no_control_character(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = written("table", capsys, short_names={"API_KEY_STATE_ACTIVE": "active"})
    assert "API_KEY_STATE" not in table
    assert " active " in table
    assert "[red] [31mx" in table
    assert "\x1b" not in table


def test_one_field_is_selected_from_answer_resource_and_rows() -> None:
    assert output.select(ANSWER, "api_key_id", rows="api_keys") == ["key_1", "key_2"]
    assert output.select(ANSWER, "limits.rps", rows="api_keys") == ["2"]
    made = {"api_key": {"api_key_id": "key_1"}, "secret": "s"}
    assert output.select(made, "api_key_id", resource="api_key") == ["key_1"]
    assert output.select(made, "secret", resource="api_key") == ["s"]
    assert output.select({"api_keys": []}, "api_key_id", rows="api_keys") == []
    with pytest.raises(Failed):
        output.select(made, "api_key_ld", resource="api_key")
