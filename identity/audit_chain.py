"""Entries of the audit log, how each is bound to the one before, and what a look at a chain finds wrong; it never
stores any.

An entry's hash is SHA-256 over the hash before it and the entry's content; the platform signs each hash, so that a row
that somebody else adds is known, and signs the end of each chain regularly, so that a tail that is cut off is missed.
docs/audit.md tells the exact form, for whoever verifies an export.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from mesh.signing import Signer, canonical, has_signed, written

KEYS_PATTERN = r"^[A-Za-z0-9+/]{43}=(,[A-Za-z0-9+/]{43}=)*$"
"""The form of the keys in a configuration: base64 of 32 bytes each."""

NO_HASH = bytes(32)
"""What stands before the first entry."""

PLATFORM_CHAIN = "platform"
"""The organization id of what was done in no organization."""

_ENTRY_SIGNED = b"aiaas.audit.entry.v1\n"
_CHECKPOINT_SIGNED = b"aiaas.audit.checkpoint.v1\n"


class AuditOutcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    DENIED = "denied"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class AuditChange:
    """One field before and after, both as JSON."""

    field: str
    before_json: str = ""
    after_json: str = ""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One attempt. `principal_kind` is that of mesh.auth.Principal, or empty for nobody. Sequence, hashes and signature
    are its place in a chain, which it gets when it is stored."""

    audit_entry_id: str
    organization_id: str
    event_time: datetime
    method: str
    outcome: AuditOutcome
    principal_kind: str = ""
    principal_id: str = ""
    api_key_id: str = ""
    permission: str = ""
    resource_type: str = ""
    resource_id: str = ""
    reason: str = ""
    changes: tuple[AuditChange, ...] = ()
    request_id: str = ""
    client_address: str = ""
    sequence: int = 0
    previous_hash: bytes = NO_HASH
    hash: bytes = b""
    key_id: str = ""
    signature: bytes = b""

    def digest(self) -> bytes:
        """The hash that the entry must have."""
        content = [
            *(self.audit_entry_id, self.organization_id, self.sequence, written(self.event_time)),
            *(self.principal_kind, self.principal_id, self.api_key_id, self.method, self.permission),
            *(self.resource_type, self.resource_id, self.outcome.value, self.reason),
            [[change.field, change.before_json, change.after_json] for change in self.changes],
            *(self.request_id, self.client_address),
        ]
        return hashlib.sha256(self.previous_hash + canonical(content)).digest()


@dataclass(frozen=True, slots=True)
class AuditCheckpoint:
    """A signature over a chain up to an entry."""

    audit_checkpoint_id: str
    organization_id: str
    sequence: int
    hash: bytes
    create_time: datetime
    key_id: str = ""
    signature: bytes = b""

    def signed(self) -> bytes:
        """What the signature is over."""
        told = [self.organization_id, self.sequence, self.hash.hex(), written(self.create_time)]
        return _CHECKPOINT_SIGNED + canonical(told)


class AuditKeys:
    """The key that signs, and those that signed before it. `keys` is base64 of 32 bytes (Ed25519 seeds, RFC 8032),
    separated by commas, the one that signs first."""

    def __init__(self, keys: str) -> None:
        signers = [Signer(base64.b64decode(key, validate=True)) for key in keys.split(",")]
        self._signer = signers[0]
        self._public = {signer.key_id: signer.public_key for signer in signers}
        self.key_id = self._signer.key_id

    def public_keys(self) -> dict[str, bytes]:
        """The raw public keys by their ids, 32 bytes each."""
        return dict(self._public)

    def chained(self, entry: AuditEntry, sequence: int, previous_hash: bytes) -> AuditEntry:
        """The entry at its place in a chain, hashed and signed."""
        placed = replace(entry, sequence=sequence, previous_hash=previous_hash)
        digest = placed.digest()
        return replace(placed, hash=digest, key_id=self.key_id, signature=self._signer.sign(_ENTRY_SIGNED + digest))

    def sign(self, checkpoint: AuditCheckpoint) -> AuditCheckpoint:
        """The checkpoint with its signature."""
        keyed = replace(checkpoint, key_id=self.key_id)
        return replace(keyed, signature=self._signer.sign(keyed.signed()))

    def has_signed_entry(self, entry: AuditEntry) -> bool:
        """Whether one of the keys signed the entry's hash."""
        return self._has_signed(entry.key_id, entry.signature, _ENTRY_SIGNED + entry.hash)

    def has_signed_checkpoint(self, checkpoint: AuditCheckpoint) -> bool:
        """Whether one of the keys signed the checkpoint."""
        return self._has_signed(checkpoint.key_id, checkpoint.signature, checkpoint.signed())

    def _has_signed(self, key_id: str, signature: bytes, signed: bytes) -> bool:
        key = self._public.get(key_id)
        return key is not None and has_signed(key, signature, signed)


@dataclass(frozen=True, slots=True)
class ChainEnd:
    """Where a chain ends: by its own row, and by the last entry that is there."""

    sequence: int
    hash: bytes
    last_sequence: int


@dataclass(frozen=True, slots=True)
class Flaw:
    """The first entry that is wrong, and what is wrong with it."""

    sequence: int
    problem: str


class ChainWalk:
    """A walk along a chain, from the entry after `sequence` on, whose hash is `previous_hash`. It ends at a flaw."""

    def __init__(
        self, keys: AuditKeys, checkpoints: Iterable[AuditCheckpoint], sequence: int = 0, previous_hash: bytes = NO_HASH
    ) -> None:
        self._keys = keys
        self._checkpoints: dict[int, list[AuditCheckpoint]] = {}
        for checkpoint in checkpoints:
            self._checkpoints.setdefault(checkpoint.sequence, []).append(checkpoint)
        self._began = sequence
        self.sequence = sequence
        self._hash = previous_hash

    def take(self, entries: Iterable[AuditEntry]) -> Flaw | None:
        """Look at the next entries, in the order of their sequences."""
        for entry in entries:
            if flaw := self._flaw(entry):
                return flaw
            self.sequence, self._hash = entry.sequence, entry.hash
        return None

    def end(self, end: ChainEnd) -> Flaw | None:
        """Look at the end, once all entries were taken."""
        missing = self.sequence + 1
        if signed := [sequence for sequence in self._checkpoints if sequence > self.sequence]:
            return Flaw(missing, f"It is missing: a checkpoint was signed over entry {max(signed)}.")
        if end.sequence > self.sequence:
            return Flaw(missing, f"It is missing: the chain has had {end.sequence} entries.")
        if end.sequence < self.sequence:
            return Flaw(end.sequence + 1, "It was added after the end of the chain.")
        if end.hash != self._hash:
            return Flaw(max(self.sequence, 1), "It is not the entry that the chain ended with.")
        return None

    def _flaw(self, entry: AuditEntry) -> Flaw | None:
        expected = self.sequence + 1
        if entry.sequence != expected:
            return Flaw(expected, "It is missing.")
        if entry.hash != entry.digest():
            return Flaw(expected, "It was edited, or is not where it was written: its hash is not that of its content.")
        if not self._keys.has_signed_entry(entry):
            return Flaw(expected, "It was not written by the platform: no key of it signed the hash.")
        if entry.previous_hash != self._hash:
            # Both were signed, so one of them stood elsewhere; what comes after bears out the later one.
            replaced = expected - 1 if self.sequence > self._began else expected
            return Flaw(replaced, "It is not the one that the next entry was chained to.")
        for checkpoint in self._checkpoints.get(expected, ()):
            if not self._keys.has_signed_checkpoint(checkpoint):
                return Flaw(expected, f"The signature of its checkpoint {checkpoint.audit_checkpoint_id} is wrong.")
            if checkpoint.hash != entry.hash:
                return Flaw(
                    expected, f"It is not the one that checkpoint {checkpoint.audit_checkpoint_id} was signed over."
                )
        return None
