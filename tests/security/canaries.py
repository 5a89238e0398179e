"""Canaries: values that nobody must find where they do not belong, and the search for them; it never makes one up whose
form a service would not take.
"""

from __future__ import annotations

import base64
import contextlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from urllib.parse import quote

_LEAST = 12


@dataclass
class Canaries:
    """What flew, by what it is ("password", "session token", ...); several may be of one kind."""

    flown: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, text: str) -> str:
        """Release one and return it. Of a platform's token only the secret part is one: its id may be told."""
        secret = text.rpartition("_")[2] if text.startswith(("aia", "ais", "whsec_")) else text
        assert len(secret) >= _LEAST, f"a {kind} of {len(secret)} characters would be found anywhere"
        self.flown.setdefault(secret, kind)
        return text

    def kinds(self) -> set[str]:
        """Of which kinds there were any."""
        return {kind.partition(":")[0] for kind in self.flown.values()}

    def found_in(self, texts: Iterable[bytes]) -> set[str]:
        """The kinds that can be read in any of these, in whatever usual way they are written."""
        forms = {form: kind for secret, kind in self.flown.items() for form in _forms(secret)}
        return {kind for text in texts for form, kind in forms.items() if form in text}


def _forms(secret: str) -> Iterator[bytes]:
    raw = secret.encode()
    yield raw
    yield raw.hex().encode()
    yield base64.b64encode(raw).rstrip(b"=")[:-1]
    yield quote(secret, safe="").encode()
    yield json.dumps(secret)[1:-1].encode()
    with contextlib.suppress(ValueError):
        # Keys that are shown in base64 are used as bytes.
        decoded = base64.b64decode(secret, validate=True)
        if len(decoded) >= _LEAST:
            yield decoded
    if "-" in secret and secret.replace("-", "").isupper():
        # A recovery code as it is compared.
        yield secret.replace("-", "").encode()


def unpacked(texts: Iterable[bytes]) -> Iterator[bytes]:
    """Each text, and what it holds where it is compressed."""
    for text in texts:
        yield text
        for start in (0, text.find(b"\x78\x5e"), text.find(b"\x78\x01"), text.find(b"\x78\x9c")):
            if start >= 0:
                try:
                    yield zlib.decompressobj().decompress(text[start:])
                except zlib.error:
                    continue
