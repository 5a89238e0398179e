"""What a service is told of its certificate, what it says of one that ends, and which addresses want none."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from analytics.config import AnalyticsConfig
from deploy.local.certificates import Authority
from edge.config import EdgeConfig
from identity.config import IdentityConfig
from mesh.config import ConfigError, load
from mesh.tls import CertificateError, Tls, TlsConfig, is_local, opened
from router.config import RouterConfig
from tests.doubles.clock import ManualClock

PATHS = {f"AIAAS_TLS_{name}_PATH": f"/{name}" for name in ("CERTIFICATE", "KEY", "CA")}
KEY = "A" * 43 + "="
TOLD: dict[Any, dict[str, str]] = {
    RouterConfig: {
        "AIAAS_ROUTER_DATABASE_URL": "postgresql://x",
        "AIAAS_ROUTER_REDIS_URL": "redis://x",
        "AIAAS_ROUTER_AMQP_URL": "amqp://x",
        "AIAAS_ROUTER_JOURNAL_PATH": "/x",
        "AIAAS_ROUTER_IDENTITY_TARGET": "127.0.0.1:1",
        "AIAAS_ROUTER_GRPC_ADDRESS": "127.0.0.1:2",
    },
    AnalyticsConfig: {
        "AIAAS_ANALYTICS_DATABASE_URL": "postgresql://x",
        "AIAAS_ANALYTICS_REDIS_URL": "redis://x",
        "AIAAS_ANALYTICS_AMQP_URL": "amqp://x",
        "AIAAS_ANALYTICS_SECRET_KEY": KEY,
        "AIAAS_ANALYTICS_IDENTITY_TARGET": "127.0.0.1:1",
        "AIAAS_ANALYTICS_ROUTER_TARGET": "127.0.0.1:1",
        "AIAAS_ANALYTICS_GRPC_ADDRESS": "127.0.0.1:2",
    },
    EdgeConfig: {
        "AIAAS_EDGE_IDENTITY_TARGET": "127.0.0.1:1",
        "AIAAS_EDGE_ROUTER_TARGET": "127.0.0.1:1",
        "AIAAS_EDGE_ANALYTICS_TARGET": "127.0.0.1:1",
    },
    IdentityConfig: {
        "AIAAS_IDENTITY_DATABASE_URL": "postgresql://x",
        "AIAAS_IDENTITY_AMQP_URL": "amqp://x",
        "AIAAS_IDENTITY_AUDIT_KEY": KEY,
        "AIAAS_IDENTITY_SECRET_KEY": KEY,
        "AIAAS_IDENTITY_GRPC_ADDRESS": "127.0.0.1:2",
    },
}
ADDRESSES = [
    (cls, variable)
    for cls, told in TOLD.items()
    for variable in told
    if variable.endswith(("_TARGET", "_GRPC_ADDRESS"))
]


def config(folder: Path, *, life: timedelta = timedelta(days=10)) -> TlsConfig:
    """A certificate of the router that lives so long from now, in files."""
    authority = Authority.make()
    certificate, key = authority.issue("router", life=life)
    contents = {"own.pem": certificate, "key.pem": key, "ca.pem": authority.certificate}
    for name, text in contents.items():
        (folder / name).write_text(text)
    own, private, ca = (str(folder / name) for name in contents)
    return TlsConfig(certificate_path=own, key_path=private, ca_path=ca)


@pytest.mark.parametrize("missing", sorted(PATHS))
def test_paths_are_set_together(missing: str) -> None:
    with pytest.raises(ConfigError, match="must be set together"):
        load(TlsConfig, {name: path for name, path in PATHS.items() if name != missing})


def test_certificates_contradict_off() -> None:
    with pytest.raises(ConfigError, match="AIAAS_TLS is off"):
        load(TlsConfig, PATHS | {"AIAAS_TLS": "off"})


@pytest.mark.parametrize(("cls", "variable"), ADDRESSES)
def test_address_beyond_this_machine_wants_certificates_or_a_word(cls: Any, variable: str) -> None:
    assert not load(cls, TOLD[cls]).tls.is_on
    far = TOLD[cls] | {variable: "10.0.0.1:27001"}
    with pytest.raises(ConfigError, match=f"{variable} is '10.0.0.1:27001', beyond this machine"):
        load(cls, far)
    assert load(cls, far | PATHS).tls.is_on
    assert not load(cls, far | {"AIAAS_TLS": "off"}).tls.is_on


@pytest.mark.parametrize("service", [IdentityConfig, RouterConfig, AnalyticsConfig])
def test_public_address_wants_certificates(service: Any) -> None:
    variable = f"AIAAS_{service.__name__.removesuffix('Config').upper()}_PUBLIC_GRPC_ADDRESS"
    told = TOLD[service] | {variable: "127.0.0.1:1"}
    for off in ({}, {"AIAAS_TLS": "off"}):
        with pytest.raises(ConfigError, match=f"{variable} wants certificates"):
            load(service, told | off)
    assert load(service, told | PATHS).public_grpc_address == "127.0.0.1:1"


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.1.2.3:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/run/s", True),
        ("unix:s", True),
        ("unix-abstract:s", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("dns:///localhost:1", True),
        ("dns://127.0.0.1/router:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("router:1", False),
        ("dns:///router.aiaas.svc:1", False),
        ("localhost.example:1", False),
        ("10.0.0.1:1", False),
        (":1", False),
    ],
)
def test_addresses_of_this_machine_are_known(target: str, local: bool) -> None:
    assert is_local(target) is local


async def test_without_certificates_there_is_plain_text() -> None:
    async with opened(TlsConfig()) as tls:
        assert tls is None


@pytest.mark.parametrize("name", ["own.pem", "key.pem", "ca.pem"])
@pytest.mark.parametrize("text", [None, "", "secret words"])
def test_wrong_file_is_named_and_not_quoted(tmp_path: Path, name: str, text: str | None) -> None:
    made = config(tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(CertificateError) as raised:
        Tls(made, ManualClock())
    assert str(tmp_path / name) in str(raised.value)
    assert "secret words" not in str(raised.value)


def test_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    made = config(tmp_path)
    (tmp_path / "key.pem").write_text(Authority.make().key)
    with pytest.raises(CertificateError, match="is not that of the certificate"):
        Tls(made, ManualClock())


async def test_end_of_the_certificate_is_a_metric(tmp_path: Path) -> None:
    def ends(which: str) -> float | None:
        return REGISTRY.get_sample_value("aiaas_certificate_expiry_timestamp_seconds", {"certificate": which})

    now = datetime.now(UTC).timestamp()
    tls = Tls(config(tmp_path, life=timedelta(days=10)), ManualClock())
    assert ends("own") == pytest.approx(now + 10 * 86_400, abs=60)
    assert ends("ca") == pytest.approx(now + 3650 * 86_400, abs=60)
    began = REGISTRY.get_sample_value("aiaas_certificate_start_timestamp_seconds", {"certificate": "own"})
    assert began is not None
    assert began <= now
    config(tmp_path, life=timedelta(days=20))
    assert tls.renew()
    assert ends("own") == pytest.approx(now + 20 * 86_400, abs=60)


@pytest.mark.parametrize(("days_left", "warned"), [(3.0, False), (1.9, True), (-1.0, True)])
async def test_certificate_that_was_not_renewed_in_time_is_a_warning(
    tmp_path: Path, days_left: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock(datetime.now(UTC) + timedelta(days=10 - days_left))
    async with opened(config(tmp_path, life=timedelta(days=10)), clock):
        await asyncio.sleep(0)
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in said] == ["the certificate ends soon and was not renewed"] * warned


async def test_new_files_are_taken_up_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.tls._LOOK_S", 0.01)
    async with opened(config(tmp_path)) as tls, asyncio.timeout(5):
        assert tls is not None
        config(tmp_path)
        while tls.generation == 0:
            await asyncio.sleep(0.01)
