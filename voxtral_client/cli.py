"""What the scripts' command lines share: where the server is, exit codes, Ctrl+C."""

import argparse
import asyncio
import os
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable

from .audio import AudioError
from .session import DEFAULT_URL, Lost, Refused, Server
from .transcriber import GIVE_UP_SECONDS, GaveUp


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0 seconds")
    return value


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
        help="stop after so long without an answer (default: %(default).0f)",
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
    """Ctrl+C: the first sets `stop`, to end the audio, so that the last words still arrive; the second stops."""

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

        signal.signal(signal.SIGINT, interrupt)


def run(main: Awaitable[int]) -> int:
    """Run a script's coroutine; turn what users run into one line on stderr and an exit code."""
    try:
        return asyncio.run(main)
    except (Refused, Lost, GaveUp, AudioError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 1
