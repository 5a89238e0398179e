"""`aiaas chat`: a conversation in the terminal, as tokens come; it keeps none of it once it ends."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from cli.errors import Failed, UsageProblem, refusal
from cli.session import Session

_PATH = "/v1/chat/completions"
_DATA = "data:"
_DONE = "[DONE]"


@click.command()
@click.argument("model")
@click.argument("prompt", nargs=-1)
@click.option("--system", metavar="TEXT", help="What the model is told before.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="The longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 2))
@click.option("--usage", "shows_usage", is_flag=True, help="Tell afterwards how many tokens it took.")
@click.pass_obj
def chat(
    session: Session,
    model: str,
    prompt: tuple[str, ...],
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    shows_usage: bool,
) -> None:
    """Talk to MODEL. With a PROMPT, or text on standard input, one answer; else until Ctrl-D."""
    asked: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    asked |= {
        name: value for name, value in (("max_tokens", max_tokens), ("temperature", temperature)) if value is not None
    }
    messages = [{"role": "system", "content": system}] if system else []
    if not prompt and sys.stdin.isatty():
        _converse(session, asked, messages, shows_usage)
        return
    text = " ".join(prompt) or sys.stdin.read().strip()
    if not text:
        raise UsageProblem("There is nothing to say: give a PROMPT, or text on standard input.")
    _answer(session, asked, [*messages, {"role": "user", "content": text}], shows_usage)


def _converse(session: Session, asked: dict[str, Any], messages: list[dict[str, str]], shows_usage: bool) -> None:
    click.echo(f"{asked['model']} at {session.base_url}; Ctrl-D ends it, Ctrl-C stops an answer.", err=True)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer = _answer(session, asked, messages, shows_usage)
        except KeyboardInterrupt:
            answer = "(stopped)"
            click.echo(" (stopped)", err=True)
        except click.ClickException as error:
            # The conversation goes on without what could not be answered.
            error.show()
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(session: Session, asked: dict[str, Any], messages: list[dict[str, str]], shows_usage: bool) -> str:
    """Show an answer as it comes, and give it as a whole. Raises ClickException."""
    parts: list[str] = []
    usage: dict[str, Any] = {}
    with session.client.stream("POST", _PATH, body=asked | {"messages": messages}) as lines:
        for chunk in chunks(lines):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or ():
                part = (choice.get("delta") or {}).get("content") or ""
                parts.append(part)
                click.echo(_shown(part), nl=False)
                sys.stdout.flush()
    click.echo()
    if shows_usage and usage:
        click.echo(f"{usage.get('prompt_tokens')} tokens in, {usage.get('completion_tokens')} out", err=True)
    return "".join(parts)


def chunks(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The chunks of a stream of server-sent events. Raises Failed for an error in it, or where it breaks off."""
    for line in lines:
        if not line.startswith(_DATA):
            continue
        data = line[len(_DATA) :].strip()
        if data == _DONE:
            return
        chunk = json.loads(data)
        if "error" in chunk:
            told = refusal(200, {}, chunk)
            raise Failed(f"The answer broke off: {told.message} ({told.reason})")
        yield chunk
    raise Failed("The answer broke off.")


def _shown(text: str) -> str:
    """Without what would move the cursor or change the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
