"""Checks of the port, the certificate and the key. Explains why a host cannot be reached."""

import errno
import ipaddress
import socket
import ssl
import sys
import urllib.parse
import urllib.request

from voxtral_client.protocol import key_fault

from . import Stop
from .settings import Settings


def check(settings: Settings) -> None:
    """Raise Stop if vLLM would fail after its start. Warn on stderr if others can use the server or read the key."""
    host, port = settings["HOST"], settings["PORT"]
    if not (port.isdecimal() and int(port) < 65536):
        raise Stop(f"{settings.assignment('PORT', port)}: must be a number up to 65535", 2)
    check_port(host, int(port))
    check_certificate(settings["TLS_CERT"], settings["TLS_KEY"])
    given = settings.on_command_line("API_KEY")
    if fault := key_fault(settings["API_KEY" if given else "VLLM_API_KEY"]):
        raise Stop(f"{'--api-key' if given else 'VLLM_API_KEY'}: {fault}", 2)
    if given:
        warn("others can read --api-key in the list of processes and in the log: set VLLM_API_KEY instead")
    elif not settings["VLLM_API_KEY"] and not is_loopback(host):
        warn("without a key everyone on the network can use this server: run scripts/make-key, or set HOST=127.0.0.1")


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def check_port(host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, ValueError) as error:  # ValueError: a name that none can have
        fix = error
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            fix = "another program has this port: stop it, or choose another port: PORT=8001 ./serve.sh"
        elif getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            fix = "HOST must be an address of this machine; 0.0.0.0 for all of them"
        raise Stop(f"{host}:{port}: {fix}") from None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_certificate(certificate: str, key: str) -> None:
    """Raise Stop unless both files are given, readable and a pair, or neither is given."""
    if not certificate and not key:
        return
    if not certificate or not key:
        raise Stop("TLS needs both TLS_CERT and TLS_KEY; scripts/make-certificate makes them", 2)
    for path in (certificate, key):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise Stop(f"{path}: {error.strerror}; scripts/make-certificate makes a certificate and its key") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        why = {
            "KEY_VALUES_MISMATCH": "the key belongs to another certificate",
            "NO_START_LINE": "TLS_CERT must be a certificate in PEM format",
        }
        reason = why.get(error.reason, "TLS_KEY must be its private key, in PEM format and without a password")
        raise Stop(f"TLS_CERT={certificate} and TLS_KEY={key} do not match: {reason}") from None


def cause(error: BaseException | None, url: str) -> str:
    """Return why `url` cannot be reached. `error`: an HTTP client's; its causes are examined too."""
    host = urllib.parse.urlsplit(url).hostname or url
    via, scheme = "", urllib.parse.urlsplit(url).scheme
    proxies = urllib.request.getproxies()
    if (proxy := proxies.get(scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(host):
        host = urllib.parse.urlsplit(proxy).hostname or proxy  # without the password that may be in it
        via = f" (the proxy of {scheme.upper()}_PROXY)"
    first, chain = error, []
    while error and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        if isinstance(link, ssl.SSLCertVerificationError):
            why = f"its certificate is not trusted ({link.verify_message})"
            return f"{why}; if a firewall decrypts TLS here, set SSL_CERT_FILE to a file with its certificate"
        if isinstance(link, socket.gaierror):
            return f"{host}{via} is not found by DNS: check the connection and the name"
        if isinstance(link, ConnectionRefusedError):
            return f"{host}{via} refuses the connection"
        if isinstance(link, TimeoutError) or "Timeout" in type(link).__name__:
            return f"{host}{via} does not answer in time: is a firewall in between?"
        if type(link).__name__ == "ProxyError":
            return f"{host}{via} answers: {link}"
    return str(first) or type(first).__name__
