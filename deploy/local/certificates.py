"""The certificate authority of the local stack, and a certificate for each service; nothing else trusts it.

The authority is made once and kept in the state folder; certificates are made anew at each start.
"""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.local.state import State
from mesh.tls import dns_name

# Whom each certificate is for. The gateway is two services in one process.
_NAMES = {
    "identity": ("identity",),
    "router": ("router",),
    "analytics": ("analytics",),
    "edge": ("edge",),
    "gateway": ("edge", "router"),
    "tool": ("tool",),
}
_AUTHORITY_LIFE = timedelta(days=3650)
# Longer than anybody leaves a local stack running.
_LIFE = timedelta(days=365)
# Clocks of containers may be behind.
_EARLIER = timedelta(minutes=5)


class Authority:
    """A certificate authority: `certificate` is its own, PEM."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate

    @classmethod
    def make(cls) -> "Authority":
        """A new one."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "aiaas local authority")])
        now = datetime.now(UTC)
        certificate = (
            _builder(name, name, key, now - _EARLIER, now + _AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            # By it a certificate is matched with the right one of several authorities of one name.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def load(cls, key: str, certificate: str) -> "Authority":
        """One that was made before, from PEM."""
        private = load_pem_private_key(key.encode(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError("the key of the local authority is of another kind")
        return cls(private, x509.load_pem_x509_certificate(certificate.encode()))

    @property
    def certificate(self) -> str:
        """Its own certificate, PEM."""
        return self._certificate.public_bytes(Encoding.PEM).decode()

    @property
    def key(self) -> str:
        """Its private key, PEM."""
        return _pem(self._key)

    def issue(self, *services: str, life: timedelta = _LIFE) -> tuple[str, str]:
        """A certificate that names the services, and its key, both PEM."""
        return self.issue_names(*map(dns_name, services), life=life)

    def issue_names(self, *names: str, life: timedelta = _LIFE) -> tuple[str, str]:
        """A certificate of hosts by their DNS names, and its key, both PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ", ".join(names))])
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(subject, self._certificate.subject, key, min(now, now + life) - _EARLIER, now + life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.PEM).decode(), _pem(key)


def issue(state: State) -> dict[str, dict[str, str]]:
    """A new certificate for each service and for tools, in files of the state folder that only the servers' user may
    read: the variables that tell a process of its own, by service."""
    authority = _authority(state)
    made = {}
    for name, services in _NAMES.items():
        certificate, key = authority.issue(*services)
        made[name] = {
            "AIAAS_TLS_CERTIFICATE_PATH": str(state.write(f"tls/{name}.pem", certificate)),
            "AIAAS_TLS_KEY_PATH": str(state.write(f"tls/{name}-key.pem", key)),
            "AIAAS_TLS_CA_PATH": str(state.root / "tls" / "ca.pem"),
        }
    return made


def _authority(state: State) -> Authority:
    paths = state.root / "tls" / "ca-key.pem", state.root / "tls" / "ca.pem"
    if all(path.exists() for path in paths):
        key, certificate = (path.read_text(encoding="utf-8") for path in paths)
        return Authority.load(key, certificate)
    authority = Authority.make()
    state.write("tls/ca-key.pem", authority.key)
    state.write("tls/ca.pem", authority.certificate)
    return authority


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
