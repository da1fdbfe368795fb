"""Shared by the scripts' command lines: the address of the server, exit codes, Ctrl+C."""

import argparse
import asyncio
import contextlib
import io
import os
import signal
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .errors import Problem, Refused, fault
from .protocol import DEFAULT_URL
from .script import interruptible
from .session import Server, printable
from .subtitles import Limits
from .transcriber import GIVE_UP_SECONDS

GRACE_SECONDS = 0.5  # for the last words after SIGTERM
LAST_SECONDS = 2.0  # for the end of a task that was stopped
DEFAULT = " (default: %(default)s)"


def positive(text: str) -> float:
    """Parse a positive number. Raises ArgumentTypeError or ValueError."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return float(text)


def count(text: str) -> int:
    """Parse an integer of 1 or more. Raises ArgumentTypeError or ValueError."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def many(number: int, things: str) -> str:
    """Return "1 session" or "2 sessions"; `things` is the plural."""
    return f"{number} {things.removesuffix('s') if number == 1 else things}"


class Parser(argparse.ArgumentParser):
    """A parser with --version that accepts each long option with - or _ between its words."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--version", action="version", version=__version__)

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        written = {option.replace("_", "-"): option for option in self._option_string_actions}

        def known(argument: str) -> str:
            name, equals, value = argument.partition("=")
            return written.get(name.replace("_", "-"), name) + equals + value if name[:2] == "--" else argument

        return super().parse_args([known(argument) for argument in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def add_cue_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that limit the size of a subtitle."""
    cue = {"type": count, "metavar": "N"}
    parser.add_argument(
        "--max_line_width", default=Limits.columns, help=f"characters in a line of a subtitle{DEFAULT}", **cue
    )
    parser.add_argument("--max_line_count", default=Limits.lines, help=f"lines of a subtitle{DEFAULT}", **cue)


def add_server_options(parser: argparse.ArgumentParser, give_up_after: float = GIVE_UP_SECONDS) -> None:
    """Add the options for the server's address and key, and for when to give up (default: `give_up_after` seconds)."""
    group = parser.add_argument_group("server")
    group.add_argument("--url", default=DEFAULT_URL, help=f"address of the server{DEFAULT}")
    group.add_argument("--model", help="name of the model (default: the one that the server serves)")
    group.add_argument("--api-key", help="key of the server (default: VLLM_API_KEY, else ~/.config/voxtral/key)")
    group.add_argument("--cafile", metavar="FILE", help="certificate to trust for wss://")
    group.add_argument("--insecure", action="store_true", help="trust any certificate")
    group.add_argument(
        "--give-up-after",
        type=positive,
        default=give_up_after,
        metavar="SECONDS",
        help="stop after this time without progress; a busy server is waited for (default: %(default).0f)",
    )


def server_from(options: argparse.Namespace) -> Server:
    """Return the server that the options name. Raises Refused for a bad address or certificate."""
    tls = None
    if options.cafile or options.insecure:
        try:
            tls = ssl.create_default_context(cafile=options.cafile)
        except (OSError, ssl.SSLError):
            raise Refused(f"--cafile {options.cafile}: cannot read a certificate from it") from None
        if options.insecure:
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return Server(options.url, options.api_key or stored_key(), tls)


def stored_key() -> str:
    """Return VLLM_API_KEY, even if it is empty, else the key that scripts/make-key wrote. Raises OSError."""
    if "VLLM_API_KEY" in os.environ:
        return os.environ["VLLM_API_KEY"]
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    with contextlib.suppress(FileNotFoundError):
        return (folder / "voxtral" / "key").read_text(errors="replace").strip()
    return ""


class Interrupts:
    """Ctrl+C: the first sets `stop`, which ends the audio, so that the last words arrive; the second stops the task.

    SIGTERM acts like the first, and GRACE_SECONDS later like the second. A task that does not end within LAST_SECONDS
    (nobody reads the pipe on stdout) ends with the process: files are valid at any moment.
    """

    def __init__(self, say: Callable[[str], None]):
        self.stop, self._asked = asyncio.Event(), False
        task, loop = asyncio.current_task(), asyncio.get_running_loop()

        def interrupt(*_: object) -> None:
            if self.stop.is_set() or self._asked:
                loop.call_soon_threadsafe(task.cancel, "interrupted")
                end_after(LAST_SECONDS)
            else:
                self._asked = True
                loop.call_soon_threadsafe(self.stop.set)
                loop.call_soon_threadsafe(say, "stopping: the last words are coming (Ctrl+C again to stop at once)")

        def terminate(*_: object) -> None:
            loop.call_soon_threadsafe(self.stop.set)
            loop.call_soon_threadsafe(loop.call_later, GRACE_SECONDS, task.cancel, "terminated")
            end_after(GRACE_SECONDS + LAST_SECONDS)

        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def end_after(seconds: float) -> None:
    """End the process after this time, whatever its threads wait for."""
    timer = threading.Timer(seconds, os._exit, [130])
    timer.daemon = True
    timer.start()


async def _ended(main: Awaitable[int]) -> int:
    """Wait for a script's coroutine. When it was stopped, end the process: its threads may wait for a pipe forever."""
    try:
        return await main
    except asyncio.CancelledError:
        print("stopped", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(130)


def run(main: Awaitable[int]) -> int:
    """Run a script's coroutine; return its exit code, for a fault 1 after one line on stderr, for Ctrl+C 130."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - None if the shell closed it: `>&-`
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until Interrupts takes over
        interruptible()
    try:
        return asyncio.run(_ended(main))
    except Problem as error:
        print(f"error: {printable(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # `| head` has ended
            name = printable(error.filename or "standard output")
            print(f"error: {name}: {error.strerror}", file=sys.stderr)
        with contextlib.suppress(OSError, ValueError):  # at its exit Python would write again, and print the error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        print(f"error: {fault(error)}", file=sys.stderr)
    return 1
