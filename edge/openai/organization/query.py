"""Reads the query of OpenAI's administration API, with lists as "models=a&models=b" or "models[]=a"; it never asks
anything."""

from collections.abc import Collection, Mapping
from urllib.parse import parse_qsl

from mesh.errors import PlatformError, Reason

_FIELDS = 1000


class Query:
    """The parameters of one request."""

    def __init__(self, encoded: bytes, known: Collection[str]) -> None:
        """Raises PlatformError: INVALID_ARGUMENT, and UNKNOWN_FIELD for a parameter that is not `known`."""
        try:
            pairs = parse_qsl(encoded.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_FIELDS)
        except ValueError:
            raise PlatformError(
                Reason.INVALID_ARGUMENT, description="The query is not valid: too many fields, or not UTF-8."
            ) from None
        self._values: dict[str, list[str]] = {}
        for name, text in pairs:
            plain = name.removesuffix("[]")
            if plain not in known:
                raise PlatformError(Reason.UNKNOWN_FIELD, field=name)
            self._values.setdefault(plain, []).append(text)

    def texts(self, name: str) -> list[str]:
        """All values of a list; empty without any."""
        return self._values.get(name, [])

    def text(self, name: str) -> str | None:
        """The only value; None without one. Raises PlatformError(INVALID_ARGUMENT) for several."""
        values = self.texts(name)
        if len(values) > 1:
            raise wrong(name, "one value")
        return values[0] if values else None

    def boolean(self, name: str) -> bool | None:
        """The value as true or false; None without one. Raises PlatformError(INVALID_ARGUMENT)."""
        text = self.text(name)
        if text not in (None, "true", "false"):
            raise wrong(name, "true or false")
        return None if text is None else text == "true"

    def number(self, name: str, least: int, most: int) -> int | None:
        """The value as a number within both bounds; None without one. Raises PlatformError(INVALID_ARGUMENT)."""
        text = self.text(name)
        if text is None:
            return None
        # A text this short is no work for int.
        if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
            raise wrong(name, f"an integer from {least} to {most}")
        return int(text)

    def choice(self, name: str, choices: Collection[str], default: str) -> str:
        """The value, one of the choices. Raises PlatformError(INVALID_ARGUMENT)."""
        text = self.text(name)
        if text is None:
            return default
        if text not in choices:
            raise wrong(name, _one_of(choices))
        return text

    def choices(self, name: str, choices: Mapping[str, object]) -> list[str]:
        """All values of a list, each one of the choices and there once. Raises PlatformError(INVALID_ARGUMENT)."""
        texts = self.texts(name)
        if any(text not in choices for text in texts):
            raise wrong(name, _one_of(choices))
        return list(dict.fromkeys(texts))


def wrong(name: str, expected: str) -> PlatformError:
    """The error for a parameter that is something else than what is expected."""
    return PlatformError(
        Reason.INVALID_ARGUMENT, field=name, description=f"Invalid value for '{name}': expected {expected}."
    )


def _one_of(choices: Collection[str]) -> str:
    return "one of " + ", ".join(choices)
