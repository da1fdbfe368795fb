"""Which proxy leads to a server, by the system's settings (HTTP_PROXY, HTTPS_PROXY, NO_PROXY and the like).

The same one for the question about the models (urllib) and for the WebSocket (websockets), whose own ways of
choosing differ.
"""

import ipaddress
import socket
import urllib.request
from urllib.parse import urlsplit

import websockets
from websockets.proxy import get_proxy, parse_proxy
from websockets.uri import parse_uri


def proxy_for(url: str) -> str | None:
    """Return the address of the HTTP proxy for a WebSocket address, or None.

    Loopback and private addresses have none: no proxy elsewhere leads there. May ask for the host's address, which
    takes time. Raises ValueError, with one line, where the settings name something that is no use.
    """
    proxy = get_proxy(parse_uri(url))
    if proxy is None or _nearby(urlsplit(url).hostname):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        scheme = parse_proxy(proxy).scheme
    except (websockets.InvalidProxy, ValueError):
        raise ValueError(f"{through(url, proxy)}: not the address of a proxy") from None
    if scheme.startswith("socks"):
        raise ValueError(f"{through(url, proxy)}: SOCKS cannot be used here, only a proxy for HTTP")
    return proxy


def through(url: str, proxy: str | None) -> str:
    """Return the address, with the proxy on the way there, if any, and how to do without it."""
    if not proxy:
        return url
    settings = urllib.request.getproxies().items()
    names = [f"{kind.upper()}_PROXY" for kind, value in settings if kind != "no" and proxy.endswith(value)]
    shown = ascii(proxy.partition("://")[2].rpartition("@")[2])[1:-1]  # without its password
    return f"{url} through the proxy {shown} ({' or '.join(names)}; without it: NO_PROXY={urlsplit(url).hostname})"


def _nearby(host: str) -> bool:
    """Does this name lead only to loopback, private, link-local and other addresses that are not the internet's?"""
    try:
        found = {info[4][0].partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False  # behind some proxies, names mean something to the proxy alone
    return not any(ipaddress.ip_address(address).is_global for address in found)
