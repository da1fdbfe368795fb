"""python -m launch.address [options of vllm serve]: print where the server of these settings is reached.

On a terminal a QR code follows that opens the captions page on a phone. It holds the key, so no log or pipe gets it.
"""

import os
import socket
import sys
from urllib.parse import quote

from . import Stop
from .network import is_loopback
from .settings import Settings


def own_address() -> str:
    """Return this machine's address in the network of its default route; without a network its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return socket.gethostname()
        return probe.getsockname()[0]


def show(settings: Settings) -> None:
    """Print the addresses, and the QR code. Raises Stop."""
    host, port, tls = settings["HOST"], settings["PORT"], "s" if settings["TLS_CERT"] else ""
    everywhere = host in ("", "0.0.0.0", "::")
    here = f"localhost:{port}" if everywhere or is_loopback(host) else f"{host}:{port}"
    print(f"this machine:  http{tls}://{here}/captions/")
    if is_loopback(host):
        return
    there = f"{own_address() if everywhere else host}:{port}"
    print(f"other clients: --url ws{tls}://{there}/v1/realtime{' --cafile ca.pem' if tls else ''}")
    if not tls:
        print('phones:        need HTTPS: docs/captions.md, "On a phone"')
        return
    page = f"https://{there}/captions/"
    print(f"phones:        {page}")
    if sys.stdout.isatty():
        try:
            import segno
        except ImportError:
            raise Stop("the package segno is not installed: run ./setup.sh") from None
        key = settings["API_KEY"] or settings["VLLM_API_KEY"]
        segno.make(f"{page}#key={quote(key, safe='')}" if key else page, micro=False).terminal(compact=True)


if __name__ == "__main__":
    try:
        show(Settings(os.environ, sys.argv[1:]))
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        sys.exit(stop.code)
