"""The command line of the local stack: starts it, proves it, shows how to use it, stops it; never decides how.

python -m deploy.local --port 8080 --engine llamacpp
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time

from rich.console import Console
from rich.markup import escape

from deploy.local.errors import LocalError
from deploy.local.proof import QUESTION, Proof, prove
from deploy.local.stack import Stack, running
from deploy.local.state import State
from deploy.local.supervisor import Event

EXIT_FAILED = 1
# In the state folder while a proven stack runs, for programs that use it: base_url, api_key, organization_id.
READY_FILE = "ready.json"
# It is no reason to stop, nor to stop stopping; rich turns a closed pipe into SystemExit.
CLOSED_TERMINAL = contextlib.suppress(OSError, SystemExit)


class Display:
    """What a person sees: a line for each part with its seconds; on a terminal, what still starts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._starting: list[str] = []
        self._status = console.status("")
        self._stopping = False

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()

    def settle(self) -> None:
        """Everything has started: nothing is awaited any more."""
        with CLOSED_TERMINAL:
            self._status.stop()

    def stopping(self) -> None:
        """Says that the end has begun."""
        self._stopping = True
        self._print("\nStopping. Data, logs and the key stay.")

    def report(self, event: Event) -> None:
        """Shows one event of the start, or a death afterwards; nothing once it stops."""
        if self._stopping:
            return
        if event.what == "starting":
            self._starting.append(event.name)
        elif event.name in self._starting:
            self._starting.remove(event.name)
        with CLOSED_TERMINAL:
            self._status.update("starting " + ", ".join(self._starting))
        if event.what in ("ready", "done"):
            self._print(f"  [green]✓[/] {event.name:<22}[dim]{event.seconds:6.1f} s {event.what}[/]")
        elif event.what == "died":
            self._print(f"  [red]✗[/] {event.name:<22}[dim]ended with status {event.status}[/]")

    def _print(self, line: str) -> None:
        with CLOSED_TERMINAL:
            self._console.print(line, highlight=False, soft_wrap=True)

    def proved(self, stack: Stack, proof: Proof, state: State) -> None:
        """Shows the proof and how to go on."""
        key, url = stack.platform_key, stack.base_url
        lines = [
            "",
            f"[dim]{escape(QUESTION)}[/]",
            f"[bold]{escape(proof.answer)}[/]",
            f"[dim]first word after {proof.first_word_s * 1000:.0f} ms, {proof.completion_tokens} tokens "
            f"in {proof.whole_s:.2f} s, usage in analytics {proof.usage_s:.1f} s later; "
            f"everything in {time.monotonic() - self._began:.1f} s[/]",
            "",
            f"API key   {key}",
            f"State     {escape(str(state.root))} (data, and logs in logs/)",
            "",
            f"curl -N {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' "
            '-d \'{"model": "smollm2", "stream": true, "messages": \\[{"role": "user", "content": "Hello"}]}\'',
            "",
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{url}/v1", api_key="{key}")',
            'print(client.chat.completions.create(model="smollm2", messages=\\[{"role": "user", "content": "Hello"}]))',
            "",
            "Ctrl-C stops it.",
        ]
        for line in lines:
            self._print(line)


async def _serve(arguments: argparse.Namespace, display: Display) -> None:
    with State.open() as state:
        state.forget(READY_FILE)
        async with running(
            state,
            port=arguments.port,
            engine=arguments.engine,
            chat_replicas=arguments.replicas,
            one_process=arguments.one_process,
            report=display.report,
        ) as stack:
            proof = await prove(stack.base_url, stack.platform_key, stack.organization_id)
            display.settle()
            display.proved(stack, proof, state)
            ready = {
                "base_url": stack.base_url,
                "api_key": stack.platform_key,
                "organization_id": stack.organization_id,
            }
            state.save(READY_FILE, ready)
            try:
                await stack.supervisor.wait()
            finally:
                state.forget(READY_FILE)


async def _until_told(arguments: argparse.Namespace, display: Display) -> None:
    """Serves until the first signal; further ones change nothing, as stopping is under way."""
    work = asyncio.create_task(_serve(arguments, display))
    told = False

    def stop() -> None:
        nonlocal told
        if not told:
            told = True
            work.cancel()
            display.settle()
            display.stopping()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    with contextlib.suppress(asyncio.CancelledError):
        await work


def main() -> None:
    """Runs the stack in the foreground. Raises SystemExit: 0 when stopped by a signal, 1 when it could not start."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description="The whole platform on this machine.")
    environ = os.environ
    parser.add_argument(
        "--port", type=int, default=environ.get("PORT") or 8080, help="public port (default: PORT, 8080)"
    )
    parser.add_argument(
        "--engine", default=environ.get("ENGINE") or "llamacpp", help="llamacpp or vllm (default: ENGINE)"
    )
    parser.add_argument("--replicas", type=int, default=1, help="engines for the chat model (default: 1)")
    parser.add_argument(
        "--one-process",
        action="store_true",
        default=environ.get("ONE_PROCESS") == "1",
        help="edge and router in one process (default: ONE_PROCESS=1)",
    )
    arguments = parser.parse_args()
    with Display(Console()) as display:
        try:
            asyncio.run(_until_told(arguments, display))
        except LocalError as error:
            display.settle()
            print(f"\n{error}", file=sys.stderr)
            sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
