"""What all of the OAuth2 provider's rooms share: kinds of secrets, lifetimes, scopes, parameters; it decides nothing.

Refusals are Authlib's errors (RFC 6749, 5.2), which name nobody's secret.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from datetime import timedelta

from authlib.oauth2.rfc6749 import InvalidRequestError, InvalidScopeError

from identity import roles
from mesh.tokens import TokenKind

CLIENT_SECRET = TokenKind("aics_", "client")
AUTHORIZATION_CODE = TokenKind("aiac_", "authz")
REFRESH_TOKEN = TokenKind("aiar_", "refresh")

CODE_LIFETIME = timedelta(seconds=60)
ACCESS_LIFETIME = timedelta(hours=1)
ID_TOKEN_LIFETIME = ACCESS_LIFETIME
FAMILY_LIFETIME = timedelta(hours=24)
"""From the use of a code to the end of every refresh token that came of it (OWASP ASVS 5.0, 10.4.8)."""

OPENID_SCOPES = ("openid", "profile", "email")
"""The scopes that say what a client may know of a user; all others are permissions."""


class Parameters:
    """The parameters of a request, where an empty one is as good as none (RFC 6749, 3.1)."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._pairs = tuple(pairs)

    def get(self, name: str) -> str:
        """The first value of that name, or nothing."""
        return next((value for key, value in self._pairs if key == name), "")

    def need(self, name: str) -> str:
        """The value of that name. Raises InvalidRequestError if there is none."""
        value = self.get(name)
        if not value:
            raise InvalidRequestError(f"The parameter {name} is missing.")
        return value

    def check_once(self, *names: str) -> None:
        """Raise InvalidRequestError if one of these names, or without them any, is there twice."""
        given = [key for key, _ in self._pairs if not names or key in names]
        if len(given) != len(set(given)):
            raise InvalidRequestError("A parameter is there more than once.")

    def digest(self) -> str:
        """The SHA-256 of them all in their order, in hexadecimal."""
        return hashlib.sha256(json.dumps(self._pairs).encode()).hexdigest()


def is_scope(scope: str) -> bool:
    """Whether there is such a scope."""
    return scope in OPENID_SCOPES or bool(roles.expand(scope))


def permissions_of(scopes: Iterable[str]) -> frozenset[str]:
    """The permissions that scopes name together; unlike an API key, a token without any carries none."""
    return frozenset[str]().union(*map(roles.expand, scopes))


def are_within(scopes: Collection[str], bounds: Collection[str]) -> bool:
    """Whether scopes allow nothing that `bounds` do not."""
    claims = {scope for scope in scopes if scope in OPENID_SCOPES}
    return claims <= set(bounds) and permissions_of(scopes) <= permissions_of(bounds)


def requested_scopes(parameters: Parameters, bounds: tuple[str, ...]) -> tuple[str, ...]:
    """The scopes that are asked for, or all of `bounds` where none are. Raises InvalidScopeError for any beyond."""
    scopes = tuple(dict.fromkeys(parameters.get("scope").split())) or bounds
    if not all(map(is_scope, scopes)) or not are_within(scopes, bounds):
        raise InvalidScopeError("A scope is unknown, or not for this client.")
    return scopes
