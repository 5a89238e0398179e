"""Starts the command line: `aiaas`, or `python -m cli`."""

import os
import sys

import click

from cli.tree import root


def main() -> None:
    """Run the command that the command line names, and exit with its code."""
    try:
        code = root.main(prog_name="aiaas", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("\nStopped.", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except BrokenPipeError:
        # Whoever read has had enough; what is left must not be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
