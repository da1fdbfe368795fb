"""The realtime protocol of vLLM's `/v1/realtime`: one WebSocket, one session.

    -> session.update {model}            <- session.created
    -> input_audio_buffer.commit         starts the transcription
    -> input_audio_buffer.append {audio} <- transcription.delta, one for each 80 ms frame
    -> input_audio_buffer.commit {final} <- transcription.done {text, usage}

Behaviour of vLLM 0.32.0, from its `entrypoints/speech_to_text/realtime/` and from tests. Every error becomes one of two
exceptions: `Refused` (trying again is useless) or `SessionLost` (a new session may continue where this one stopped).
"""

import asyncio
import base64
import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

import websockets

from .errors import NotAdmitted, Refused, SessionLost
from .protocol import DEFAULT_URL, key_fault
from .proxies import proxy_for, through

ANSWER_SECONDS = 10.0  # limit for the handshake, session.created and /v1/models; usually they take milliseconds


def printable(text: object) -> str:
    """Return a server's text in one line that is safe for a terminal: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go to wherever it points."""

    def redirect_request(self, *_: object) -> None:
        return None


class _Connect(websockets.connect):
    """The same for a WebSocket."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


@dataclass
class Server:
    """Address and key of the server. `url`: address of the WebSocket; `http://`, and no path, are completed.

    `api_key`: the server's key, if it has one. `tls`: what to trust for `wss://`, by default what the system trusts.
    Raises Refused where the address or the key is none.
    """

    url: str = DEFAULT_URL
    api_key: str | None = None
    tls: ssl.SSLContext | None = None
    _models: list[dict] = field(default_factory=list, init=False, repr=False)
    _granted: bool = field(default=False, init=False, repr=False)  # a session, so that this is a realtime server

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        try:
            valid = scheme in ("ws", "wss") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            valid = False
        if not valid:
            raise Refused(f"{self.url}: not a server address; write ws://HOST:8000/v1/realtime")
        if fault := key_fault(self.api_key or ""):
            raise Refused(f"the API key (VLLM_API_KEY, --api-key or ~/.config/voxtral/key): {fault}")
        path = parts.path.rstrip("/") or "/v1/realtime"
        self.url = urlunsplit((scheme, parts.netloc, path, parts.query, ""))
        self.tls = (self.tls or ssl.create_default_context()) if scheme == "wss" else None

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers with the key."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    async def models(self) -> list[dict]:
        """Return the server's models, as `/v1/models` lists them. Only the first call sends a request.

        Of each model: `id`; `max_model_len` in tokens; `voxtral_speed`: True where a frame costs the same at any length
        of the session; `max_sessions` at once. What the server does not tell is None: stock vLLM lacks the last two.
        Raises Refused (wrong key, not a vLLM server) or SessionLost (no server there, or not ready).
        """
        parts = urlsplit(self.url)
        path = parts.path.removesuffix("/realtime") + "/models"
        url = urlunsplit((parts.scheme.replace("ws", "http", 1), parts.netloc, path, "", ""))
        self._models = self._models or await asyncio.to_thread(self._get_models, url)
        return self._models

    async def model(self, name: str | None = None) -> dict:
        """Return the entry of `models` for `name`, or the first. Raises Refused (no such model), or as `models`."""
        known = {entry["id"]: entry for entry in await self.models()}
        if not known:
            raise Refused(f"{self.url}: the server serves no model")
        name = name or next(iter(known))
        if name not in known:
            raise Refused(f"the server has no model {name}; it serves {', '.join(known)}")
        return known[name]

    def _get_models(self, url: str) -> list[dict]:
        proxy, request = proxy_for(self.url), urllib.request.Request(url, headers=self.headers)
        handlers = [urllib.request.ProxyHandler({request.type: proxy} if proxy else {}), _Stay]
        if self.tls:
            handlers.append(urllib.request.HTTPSHandler(context=self.tls))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=ANSWER_SECONDS) as reply:
                models = json.load(reply)["data"]
            optional = ("max_model_len", "voxtral_speed", "max_sessions")
            return [{"id": str(model["id"])} | {name: model.get(name) for name in optional} for model in models]
        except urllib.error.HTTPError as error:
            body = b""
            with error, suppress(OSError, http.client.HTTPException):
                body = error.read()
            raise self._http_refusal(error.code, error.headers, body, proxy) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError) and not isinstance(reason, ssl.SSLCertVerificationError):
                raise Refused(f"{self.url}: the server does not speak TLS; write ws:// for wss://") from None
            if isinstance(error, ConnectionError) and not proxy:
                raise Refused(f"{self.url}: the server hung up; if it speaks TLS, write wss:// for ws://") from None
            raise self._no_connection(reason, proxy) from None
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
            raise Refused(f"{self.url}: not a vLLM realtime server") from None

    def _no_connection(self, reason: object, proxy: str | None) -> Refused | SessionLost:
        if isinstance(reason, ssl.SSLCertVerificationError):
            return Refused(f"{self.url}: certificate not trusted ({reason.verify_message}); give it with --cafile FILE")
        why = printable(getattr(reason, "strerror", None) or reason)
        if proxy:
            return SessionLost(f"{through(self.url, proxy)}: no answer ({why})")
        return SessionLost(f"{self.url}: no server answers there ({why}); start ./serve.sh")

    def _http_refusal(self, code: int, headers: Mapping, body: bytes, proxy: str | None) -> Refused | SessionLost:
        where = through(self.url, proxy)
        if 300 <= code < 400 and (there := headers.get("Location")):
            return Refused(f"{where}: redirects to {printable(there)}, which is not followed: give that address")
        if code == 401:
            text = "wrong API key (HTTP 401); copy ~/.config/voxtral/key from the server, or set VLLM_API_KEY"
            return NotAdmitted(f"{where}: {text}")
        if code == 403:
            return NotAdmitted(f"{where}: wrong path, or origin not allowed (HTTP 403); is it /v1/realtime?")
        if code == 429 or code >= 500:
            wait = headers.get("Retry-After", "")
            retry_after = float(wait) if wait.isdecimal() else 0.0
            reason = _reason(body) or "the server returned an error"
            return SessionLost(f"{where}: {reason} (HTTP {code})", retry_after=retry_after)
        if code == 407:
            return Refused(f"{where}: the proxy asks for a name and a password (HTTP 407)")
        return Refused(f"{where}: not a vLLM realtime server (HTTP {code})")

    def session_on(self, connection: websockets.ClientConnection) -> "Session":
        """Return what speaks the protocol on an open WebSocket."""
        return Session(connection)

    @asynccontextmanager
    async def session(self, model: str) -> AsyncIterator["Session"]:
        """Open a session on `model`, ready for audio. Raises Refused or SessionLost.

        After the first one only a refusal of the key or the origin is final: a proxy answers otherwise while the server
        behind it starts again.
        """
        async with AsyncExitStack() as stack:
            try:
                connection = await self._connect()
                stack.push_async_callback(_close, connection)
                session = self.session_on(connection)
                await session.start(model)
            except Refused as error:
                if isinstance(error, NotAdmitted) or not self._granted:
                    raise
                raise SessionLost(str(error)) from None
            self._granted = True
            yield session

    async def _connect(self) -> websockets.ClientConnection:
        """Return an open WebSocket. Raises Refused or SessionLost."""
        proxy = await asyncio.to_thread(proxy_for, self.url)
        try:
            return await _Connect(
                self.url,
                additional_headers=self.headers,
                ssl=self.tls,
                max_size=None,  # `done` contains the complete text
                compression=None,  # base64 of audio hardly shrinks, and compression costs both sides time
                close_timeout=1,
                open_timeout=ANSWER_SECONDS,
                proxy=proxy,
            )
        except (websockets.InvalidStatus, websockets.InvalidProxyStatus) as error:
            reply = error.response
            raise self._http_refusal(reply.status_code, reply.headers, reply.body or b"", proxy) from None
        except (websockets.InvalidHandshake, websockets.InvalidMessage):
            raise SessionLost(f"{through(self.url, proxy)}: the handshake broke off") from None
        except (OSError, TimeoutError) as error:
            raise self._no_connection(error, proxy) from None


async def _close(connection: websockets.ClientConnection) -> None:
    """Close a WebSocket. A server that hangs does not answer the closing handshake."""
    try:
        async with asyncio.timeout(2):
            await connection.close()
    except (TimeoutError, OSError):
        connection.transport.abort()


def _reason(body: bytes) -> str:
    """Return the message in the body of an HTTP error, in one line; "" if there is none."""
    try:
        return printable(json.loads(body)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return ""


@dataclass
class Done:
    """The server has finished the session. The fields are its counts of tokens."""

    prompt_tokens: int
    completion_tokens: int


class Session:
    """One session on an open WebSocket. Made by `Server.session`."""

    def __init__(self, socket: websockets.ClientConnection):
        self._socket = socket

    async def start(self, model: str) -> None:
        """Choose the model and start the transcription. Raises Refused or SessionLost."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                created = await self._receive()
        except TimeoutError:
            raise SessionLost(f"the server sent no session.created within {ANSWER_SECONDS:.0f} s") from None
        if created.get("type") == "error":
            raise self._error(created)
        if created.get("type") != "session.created":
            raise Refused("not a vLLM realtime server: no session.created")
        await self._send("session.update", model=model)
        await self._send("input_audio_buffer.commit")

    async def send(self, pcm: bytes) -> None:
        """Send PCM16 audio, 16 kHz mono, an even number of bytes. Raises SessionLost."""
        await self._send("input_audio_buffer.append", audio=base64.b64encode(pcm).decode())

    async def finish(self) -> None:
        """End the audio; the server then sends the last deltas and `done`. Raises SessionLost."""
        await self._send("input_audio_buffer.commit", final=True)

    async def receive(self) -> str | Done:
        """Return the text of the next frame (mostly empty), or Done. It can be cancelled without loss.

        Raises Refused or SessionLost, also for an `error` event.
        """
        while True:
            event = await self._receive()
            match event.get("type"):
                case "transcription.delta":
                    return str(event.get("delta", ""))
                case "transcription.done":
                    usage = event.get("usage") or {}
                    return Done(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
                case "error":
                    raise self._error(event)

    @staticmethod
    def _error(event: dict) -> Exception:
        text, code = printable(event.get("error", "")), event.get("code")
        if code == "model_not_found":
            return Refused(f"{text} Leave out --model to take what the server serves.")
        if code in ("model_not_validated", "invalid_event", "invalid_audio", "invalid_json", "unknown_event"):
            return Refused(f"the server refused a message ({printable(code)}): {text}")
        return SessionLost(f"server error: {text}", busy="currently busy" in text)

    async def _send(self, kind: str, **fields: object) -> None:
        try:
            await self._socket.send(json.dumps({"type": kind} | fields))
        except (websockets.ConnectionClosed, OSError) as error:
            raise SessionLost(f"connection lost ({_closing(error)})") from None

    async def _receive(self) -> dict:
        try:
            event = json.loads(await self._socket.recv())
        except (websockets.ConnectionClosed, OSError) as error:
            raise SessionLost(f"connection lost ({_closing(error)})") from None
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise Refused("not a vLLM realtime server: a message was no JSON object")
        return event


def _closing(error: Exception) -> str:
    if isinstance(error, websockets.ConnectionClosed) and error.rcvd is not None:
        return f"closed with {error.rcvd.code} {printable(error.rcvd.reason)}".strip()
    return "no closing message" if isinstance(error, websockets.ConnectionClosed) else printable(error)
