"""The state folder of the local stack."""

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.local.errors import LocalError
from deploy.local.state import Account, State, default_root, may_enter

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def state() -> Iterator[State]:
    with State.temporary() as state:
        yield state


def test_environment_variable_chooses_the_folder() -> None:
    assert default_root({"AIAAS_STATE_DIR": "/somewhere"}) == Path("/somewhere")


def test_root_keeps_its_state_with_the_system_and_a_user_with_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_root({}) == Path("/var/lib/aiaas")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_root({"XDG_STATE_HOME": "/home/a/state"}) == Path("/home/a/state/aiaas")
    assert default_root({}) == Path.home() / ".local/state/aiaas"


def test_second_stack_in_the_same_folder_is_refused_with_what_to_do(state: State) -> None:
    with pytest.raises(LocalError, match=r"already runs in .*: stop it with Ctrl-C"), State.open(state.root):
        pass


def test_folder_can_be_opened_again_after_it_was_closed(state: State) -> None:
    root = state.root / "inner"
    for _ in range(2):
        with State.open(root) as inner:
            assert inner.root == root


def test_full_disk_is_refused_with_what_to_do(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500 << 20))
    with pytest.raises(LocalError, match=r"Only 500 MiB are free .* make room"), State.open(state.root / "inner"):
        pass


def test_folder_that_cannot_be_made_is_refused_with_what_to_do(state: State) -> None:
    (state.root / "file").write_text("")
    with pytest.raises(LocalError, match="choose another with AIAAS_STATE_DIR"), State.open(state.root / "file" / "a"):
        pass


def test_secret_stays_the_same_and_is_private(state: State) -> None:
    secret = state.secret("postgres")
    assert len(secret) >= 32
    assert state.secret("postgres") == secret
    assert state.secret("valkey") != secret
    assert (state.root / "secrets" / "postgres").stat().st_mode & 0o777 == 0o600
    assert (state.root / "secrets").stat().st_mode & 0o777 == 0o700


def test_key_has_32_bytes_stays_the_same_and_is_private(state: State) -> None:
    key = state.key("analytics")
    assert len(base64.b64decode(key, validate=True)) == 32
    assert state.key("analytics") == key
    assert (state.root / "secrets" / "analytics").stat().st_mode & 0o777 == 0o600


def test_document_is_kept_and_private(state: State) -> None:
    assert state.load("a.json") is None
    state.save("a.json", {"organization_id": "org_1"})
    assert state.load("a.json") == {"organization_id": "org_1"}
    assert (state.root / "a.json").stat().st_mode & 0o777 == 0o600
    state.forget("a.json")
    assert state.load("a.json") is None


def test_temporary_state_is_removed() -> None:
    with State.temporary() as state:
        state.secret("a")
        root = state.root
    assert not root.exists()


def test_account_may_enter_what_everybody_may(tmp_path: Path) -> None:
    nobody = Account("nobody", 65534, 65534)
    assert may_enter(Path("/usr/bin/env"), nobody)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "program").write_text("")
    assert not may_enter(closed / "program", nobody)


@pytest.mark.skipif(not AS_ROOT, reason="only root runs servers as another user")
def test_program_out_of_reach_is_copied_once_for_the_service_user(state: State, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    assert state.account
    copy = state.program(program)
    assert copy != program
    assert may_enter(copy, state.account)
    assert copy.stat().st_uid == state.account.uid
    assert state.program(program) == copy


@pytest.mark.skipif(not AS_ROOT, reason="only root runs servers as another user")
def test_what_root_left_in_a_folder_is_given_to_the_service_user(state: State) -> None:
    assert state.account
    (state.folder("router") / "file").write_text("")
    assert (state.folder("router") / "file").stat().st_uid == state.account.uid
