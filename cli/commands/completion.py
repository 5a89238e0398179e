"""`aiaas completion`: prints what a shell needs; the completion itself is click's."""

import click
from click.shell_completion import get_completion_class

from cli.errors import UsageProblem


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands, options and values.

    \b
    bash:  eval "$(aiaas completion bash)"
    zsh:   eval "$(aiaas completion zsh)"
    fish:  aiaas completion fish | source
    """
    found = get_completion_class(shell)
    if found is None:
        raise UsageProblem(f"{shell} is not known.")
    click.echo(found(click.get_current_context().find_root().command, {}, "aiaas", "_AIAAS_COMPLETE").source())
