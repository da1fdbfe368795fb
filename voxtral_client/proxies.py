"""The proxy for a server by the system's settings (HTTP_PROXY, HTTPS_PROXY, NO_PROXY and others).

The list of models (urllib) and the WebSocket (websockets) use the same one. The two libraries' own rules differ.
"""

import ipaddress
import socket
import urllib.request
from urllib.parse import urlsplit

import websockets
from websockets.proxy import get_proxy, parse_proxy
from websockets.uri import parse_uri

from .errors import Refused


def proxy_for(url: str) -> str | None:
    """Return the address of the HTTP proxy for a WebSocket address, or None.

    Loopback and private addresses have none: a proxy elsewhere cannot reach them. The host's address may be looked up,
    which takes time. Raises Refused where the settings name no HTTP proxy.
    """
    proxy = get_proxy(parse_uri(url))
    if proxy is None or _nearby(urlsplit(url).hostname):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        scheme = parse_proxy(proxy).scheme
    except (websockets.InvalidProxy, ValueError):
        raise Refused(f"{through(url, proxy)}: not the address of a proxy") from None
    if scheme.startswith("socks"):
        raise Refused(f"{through(url, proxy)}: SOCKS cannot be used here, only a proxy for HTTP")
    return proxy


def through(url: str, proxy: str | None) -> str:
    """Return the address for a message: with the proxy, if any, and how to avoid it."""
    if not proxy:
        return url
    settings = urllib.request.getproxies().items()
    names = [f"{kind.upper()}_PROXY" for kind, value in settings if kind != "no" and proxy.endswith(value)]
    shown = ascii(proxy.partition("://")[2].rpartition("@")[2])[1:-1]  # without its password
    return f"{url} through the proxy {shown} ({' or '.join(names)}; without it: NO_PROXY={urlsplit(url).hostname})"


def _nearby(host: str) -> bool:
    """Has this name only addresses that are not public: loopback, private, link-local and others?"""
    try:
        found = {info[4][0].partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False  # only the proxy can resolve some names
    return not any(ipaddress.ip_address(address).is_global for address in found)
