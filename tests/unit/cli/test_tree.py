"""The tree of commands: in step with the contracts, stable, made without a line for each, and quick to show."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from aiaas.type.v1 import options_pb2
from cli.contracts import Commands
from cli.requests import RpcCommand
from cli.tree import BY_HAND, Branch, contracts, root
from edge.peers import linked_services
from edge.transcode.routes import RouteTable
from tests.doubles.throw_away_contract import compiled

ROOT = Path(options_pb2.__file__).parents[5]
SNAPSHOTS = Path(__file__).parent / "snapshots"
# What is slow to import, and what a client has no business with.
HEAVY = ("google", "grpc", "httpx", "rich", "yaml", "asyncio", "asyncpg", "aiaas", "mesh", "edge", "identity", "deploy")
# The lines that stand for RPCs in files by hand.
STANDING_FOR = {"config plan": "PlanConfiguration", "config apply": "ApplyConfiguration"}

THROW_AWAY = """
syntax = "proto3";
package thrown.away.v1;
import "aiaas/type/v1/options.proto";
import "google/protobuf/duration.proto";
// Things of all kinds.
service ThingService {
  // Changes a thing. And more is said.
  rpc UpdateThing(UpdateThingRequest) returns (UpdateThingResponse) {
    option (aiaas.type.v1.policy) = {
      permission: "things.update"
      rest: {verb: "PATCH" path: "/admin/v1/organizations/{organization_id}/things/{thing_id}" body: "thing"}
    };
  }
}
// How a thing is.
enum Mood {
  // Never sent.
  MOOD_UNSPECIFIED = 0;
  // Well.
  MOOD_VERY_WELL = 1;
}
// A thing.
message Thing {
  // The id. Output only.
  string thing_id = 1;
  // How it is.
  repeated Mood moods = 2;
  // How large.
  message Size {
    // In metres.
    double metres = 1;
  }
  // Its size.
  Size size = 3;
  // A word.
  string word = 4 [debug_redact = true];
  // How long.
  google.protobuf.Duration age = 5;
  // Of it.
  string etag = 6;
}
// Changes a thing.
message UpdateThingRequest {
  // Where.
  string organization_id = 1;
  // Which.
  string thing_id = 2;
  // New values.
  Thing thing = 3;
}
// The thing.
message UpdateThingResponse {
  // As stored.
  Thing thing = 1;
}
"""


def commands(branch: Branch = root) -> Iterator[tuple[str, click.Command]]:
    """Every command with its whole name."""
    context = click.Context(branch)
    for name in branch.list_commands(context):
        command = branch.get_command(context, name)
        assert command is not None, name
        if isinstance(command, Branch):
            yield from commands(command)
        else:
            yield " ".join((*branch.place, name)), command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(root, list(arguments), env={"AIAAS_URL": "http://127.0.0.1:1", "AIAAS_TOKEN": "t"})


def matches(name: str, text: str) -> None:
    """Compare with what is committed; UPDATE_SNAPSHOTS=1 writes it anew."""
    path = SNAPSHOTS / name
    if os.environ.get("UPDATE_SNAPSHOTS") == "1":
        path.write_text(text)
    assert text == path.read_text(), (
        f"{name} differs: names and help are an interface; UPDATE_SNAPSHOTS=1 if it is meant"
    )


def test_every_bound_rpc_is_reachable_by_exactly_one_command() -> None:
    bound = {route.method.full_name for route in RouteTable(linked_services()).routes}
    reached = Counter(command.rpc["rpc"] for _, command in commands() if isinstance(command, RpcCommand))
    by_hand = {rpc for rpc in bound if rpc.rpartition(".")[2] in STANDING_FOR.values()}
    assert set(reached) | by_hand == bound
    assert not set(reached) & by_hand
    assert set(reached.values()) == {1}


def test_commands_by_hand_stand_only_for_the_rpcs_that_are_named_here() -> None:
    known = {" ".join(command["path"]): command["rpc"].rpartition(".")[2] for command in contracts()["commands"]}
    assert {name: known[name] for path in BY_HAND if (name := " ".join(path)) in known} == STANDING_FOR


def test_what_is_known_of_the_contracts_is_fresh() -> None:
    made = Commands((ROOT / "gen/descriptors.binpb").read_bytes()).describe()
    assert contracts() == made


def test_names_of_commands_are_stable() -> None:
    matches("commands.txt", "".join(f"{name}\n" for name, _ in commands()))


@pytest.mark.parametrize(
    "line", ["", "keys", "keys create", "budgets overrides approve", "usage query", "sessions create", "login", "chat"]
)
def test_help_is_stable(line: str) -> None:
    told = run(*line.split(), "--help")
    assert told.exit_code == 0, told.output
    matches(f"help {line}".strip().replace(" ", "-") + ".txt", told.output)


def test_every_command_has_help_that_says_something() -> None:
    for name, _ in commands():
        told = run(*name.split(), "--help")
        assert told.exit_code == 0, f"{name}: {told.output}"
        assert len(told.output.splitlines()) > 4, name


def test_no_secret_can_be_given_on_the_command_line() -> None:
    seen = 0
    for name, command in commands():
        if not isinstance(command, RpcCommand):
            continue
        for field, option in zip(
            command.rpc["fields"], (each for each in command.params if isinstance(each, click.Option)), strict=False
        ):
            if field.get("is_secret"):
                seen += 1
                assert option.opts[0].endswith("-file"), f"{name} {option.opts}"
    assert seen >= 10


@pytest.mark.parametrize("line", ["--help", "keys --help", "keys create --help", "budgets overrides approve --help"])
def test_help_imports_nothing_slow(line: str) -> None:
    program = (
        "import sys\n"
        "from cli.tree import root\n"
        "root.main(sys.argv[1:], prog_name='aiaas', standalone_mode=False)\n"
        "sys.stderr.write(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, *line.split()], capture_output=True, text=True, check=True)
    assert "Usage: aiaas" in ran.stdout
    # A .pth file of an environment may import google's namespace on its own.
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    before = {name.partition(".")[0] for name in bare.stdout.split()}
    assert not set(HEAVY) & set(ran.stderr.split()) - before


def test_new_rpc_is_a_command_without_a_line_of_code(tmp_path: Path) -> None:
    (described,) = (
        command
        for command in Commands(compiled(tmp_path, THROW_AWAY)).describe()["commands"]
        if command["rpc"].startswith("thrown.")
    )
    assert described["path"] == ["things", "update"]
    command = RpcCommand(described, {})
    group = click.Group("aiaas", commands={"update": command})
    word = tmp_path / "word"
    word.write_text("hush\n")
    line = ["update", "thing_1", "--moods", "very-well", "--moods", "MOOD_VERY_WELL", "--size.metres", "2.5"]
    line += ["--word-file", str(word), "--age", "2h", "--etag", "7", "--org", "org_1", "--dry-run", "--clear", "size"]
    told = CliRunner().invoke(group, line)
    assert told.exit_code == 0, told.output
    head, _, body = told.output.partition("{")
    assert head.split() == [
        "PATCH",
        "http://127.0.0.1:8080/admin/v1/organizations/org_1/things/thing_1",
        "If-Match:",
        '"7"',
    ]
    assert json.loads("{" + body) == {
        "moods": ["MOOD_VERY_WELL", "MOOD_VERY_WELL"],
        "size": None,
        "word": "(secret)",
        "age": "7200s",
    }


def test_two_rpcs_that_would_be_one_command_are_refused(tmp_path: Path) -> None:
    twice = THROW_AWAY.replace("// Changes a thing. And more is said.", "// Once.").replace(
        "  // Once.",
        """  // The other.
  rpc UpdateOther(UpdateThingRequest) returns (UpdateThingResponse) {
    option (aiaas.type.v1.policy) = {
      public: true
      rest: {verb: "PUT" path: "/admin/v1/things" body: "thing"}
    };
  }
  // Once.""",
    )
    made = Commands(compiled(tmp_path, twice))
    with pytest.raises(ValueError, match="both the command 'things update'"):
        made.describe()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_of_a_shell_is_printed(shell: str) -> None:
    assert "_AIAAS_COMPLETE" in run("completion", shell).output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("aiaas key", {"keys"}),
        ("aiaas budgets overrides ap", {"approve"}),
        ("aiaas budgets create --unit to", {"tokens"}),
    ],
)
def test_commands_options_and_values_are_completed(words: str, expected: set[str]) -> None:
    environment = {"_AIAAS_COMPLETE": "zsh_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    ran = subprocess.run(
        [sys.executable, "-m", "cli"],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(ran.stdout.splitlines()[1::3]) == expected


def test_up_hands_over_to_the_local_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: handed.extend(arguments[1:]))
    assert run("up", "--port", "9000", "--one-process").exit_code == 0
    assert handed == ["-m", "deploy.local", "--port", "9000", "--engine", "llamacpp", "--one-process"]
