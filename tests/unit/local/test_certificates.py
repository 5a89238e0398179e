"""The certificate authority of the local stack: what is kept, what is new, who may read it."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from deploy.local.certificates import issue
from deploy.local.stack import PEERS
from deploy.local.state import State


@pytest.fixture
def state() -> Iterator[State]:
    with State.temporary() as state:
        yield state


def names_in(variables: dict[str, str]) -> list[str]:
    certificate = x509.load_pem_x509_certificate(Path(variables["AIAAS_TLS_CERTIFICATE_PATH"]).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName)


def test_each_service_has_a_certificate_that_names_it(state: State) -> None:
    made = issue(state)
    assert {name: names_in(variables) for name, variables in made.items()} == {
        name: [f"{service}.aiaas.internal" for service in (("edge", "router") if name == "gateway" else (name,))]
        for name in (*PEERS, "tool")
    }


def test_authority_is_kept_and_certificates_are_new_at_each_start(state: State) -> None:
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (state.root / "tls").iterdir()}

    issue(state)
    before = contents()
    issue(state)
    after = contents()
    assert {name for name in before if before[name] == after[name]} == {"ca.pem", "ca-key.pem"}
    assert before.keys() == after.keys()


def test_only_the_servers_user_reads_keys(state: State) -> None:
    issue(state)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (state.root / "tls").iterdir()} == {0o600}
    assert stat.S_IMODE((state.root / "tls").stat().st_mode) == 0o700
