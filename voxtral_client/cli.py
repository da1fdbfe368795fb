"""What the scripts' command lines share: where the server is, exit codes, Ctrl+C."""

import argparse
import asyncio
import contextlib
import io
import os
import signal
import ssl
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from . import UserError, __version__
from .protocol import DEFAULT_URL
from .session import Refused, Server, SessionLost
from .subtitles import LIMITS
from .transcriber import GIVE_UP_SECONDS, GaveUp

GRACE_SECONDS = 0.5  # for the last words after SIGTERM


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0 seconds")
    return value


class Parser(argparse.ArgumentParser):
    """A parser that knows --version, and takes each long option with - or _ between its words."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--version", action="version", version=__version__)

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        written = {option.replace("_", "-"): option for option in self._option_string_actions}

        def known(argument: str) -> str:
            name, equals, value = argument.partition("=")
            return written.get(name.replace("_", "-"), name) + equals + value if name[:2] == "--" else argument

        return super().parse_args([known(argument) for argument in (sys.argv[1:] if args is None else args)], namespace)


def add_cue_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that limit the size of a subtitle; they hold for the whole process."""

    class Limit(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, value: int, option: str | None = None) -> None:
            if value < 1:
                parser.error(f"{option} must be 1 or more")
            setattr(LIMITS, self.dest, value)

    most = {"action": Limit, "type": int, "metavar": "N"}
    parser.add_argument(
        "--max_line_width",
        dest="columns",
        help=f"characters in a line of a subtitle (default: {LIMITS.columns})",
        **most,
    )
    parser.add_argument("--max_line_count", dest="lines", help=f"lines of a subtitle (default: {LIMITS.lines})", **most)


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the server is and how to get in."""
    group = parser.add_argument_group("server")
    group.add_argument("--url", default=DEFAULT_URL, help="address of the server (default: %(default)s)")
    group.add_argument("--model", help="name of the model (default: the one that the server serves)")
    group.add_argument("--api-key", help="key of the server (default: the variable VLLM_API_KEY)")
    group.add_argument("--cafile", metavar="FILE", help="certificate to trust for wss://")
    group.add_argument("--insecure", action="store_true", help="trust any certificate")
    group.add_argument(
        "--give-up-after",
        type=seconds,
        default=GIVE_UP_SECONDS,
        metavar="SECONDS",
        help="stop after so long without anything new transcribed (default: %(default).0f)",
    )


def server_from(options: argparse.Namespace) -> Server:
    """Return the server that the options name. Raises Refused."""
    tls = None
    if options.cafile or options.insecure:
        try:
            tls = ssl.create_default_context(cafile=options.cafile)
        except (OSError, ssl.SSLError):
            raise Refused(f"--cafile {options.cafile}: no certificate to be read there") from None
        if options.insecure:
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    server = Server(options.url, options.api_key or os.environ.get("VLLM_API_KEY"), tls)
    if not server.url.startswith("wss"):
        server.tls = None
    return server


class Interrupts:
    """Ctrl+C: the first sets `stop`, to end the audio, so that the last words still arrive; the second stops.

    SIGTERM is the first, and soon afterwards the second.
    """

    def __init__(self, say: Callable[[str], None]):
        self.stop = asyncio.Event()
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()

        def interrupt(*_: object) -> None:
            if self.stop.is_set():
                loop.call_soon_threadsafe(task.cancel, "interrupted")
            else:
                loop.call_soon_threadsafe(self.stop.set)
                loop.call_soon_threadsafe(say, "stopping: the last words are coming (Ctrl+C again to stop at once)")

        def terminate(*_: object) -> None:
            loop.call_soon_threadsafe(self.stop.set)
            loop.call_soon_threadsafe(loop.call_later, GRACE_SECONDS, task.cancel, "terminated")

        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


async def _ended(main: Awaitable[int]) -> int:
    """Wait for a script's coroutine. When it was stopped, end the process, whatever its threads still wait for."""
    try:
        return await main
    except asyncio.CancelledError:
        print("stopped", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(130)


def run(main: Awaitable[int]) -> int:
    """Run a script's coroutine; turn what users run into one line on stderr and an exit code."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - it was closed: `>&-`
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until Interrupts takes over
    try:
        return asyncio.run(_ended(main))
    except (Refused, SessionLost, GaveUp, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        _give_up_stdout()
    except OSError as error:
        print(f"error: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        _give_up_stdout()
    except Exception as error:
        print(f"error: {fault(error)}", file=sys.stderr)
    return 1


def _give_up_stdout() -> None:
    """Let nothing more be written there: Python would try it again at the end, and complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fault(error: BaseException) -> str:
    """Return the line that tells a fault of ours, not of the user's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({os.path.basename(place[0].filename)}, line {place[0].lineno})" if place else ""
    return f"internal error, please report it: {type(error).__name__}: {error}{where}"
