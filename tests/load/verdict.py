"""The table of a load that has a bar to meet: a line for each figure; it never measures."""

from dataclasses import dataclass


@dataclass
class Verdict:
    """The lines of the table, and whether all are met."""

    met: bool = True

    def line(self, what: str, found: str, met: bool | None = None) -> None:
        """Prints one line; without `met` it only informs."""
        verdict = {True: "met", False: "**missed**", None: ""}[met]
        print(f"| {what} | {found} | {verdict} |", flush=True)
        self.met = self.met and met is not False
