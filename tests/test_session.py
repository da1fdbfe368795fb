"""Sessions with a scripted server: nothing hangs, what is refused is said."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from scripted import DIGITS, Scripted, ScriptedServer, hearing, scripted, tones
from servers import free_port

from voxtral_client import session, transcriber
from voxtral_client.audio import to_pcm16
from voxtral_client.protocol import RATE
from voxtral_client.proxies import proxy_for
from voxtral_client.session import Refused, Server, SessionLost
from voxtral_client.timeline import Word
from voxtral_client.transcriber import GaveUp, Transcriber


async def pieces(samples: np.ndarray) -> AsyncIterator[bytes]:
    pcm = to_pcm16(samples)
    for at in range(0, len(pcm), 3200):
        yield pcm[at : at + 3200]


async def transcribe(
    server: ScriptedServer, chunks: AsyncIterator[bytes], told: list[str] | None = None, **options
) -> tuple[list[Word], list[str]]:
    """Return the words, and what the user was told."""
    told = [] if told is None else told
    client = Transcriber(Server(server.url), notify=lambda state, message: told.append(message), **options)
    await client.open()
    return [word async for word in client.words(chunks)], told


def text(words: list[Word]) -> str:
    return "".join(word.text for word in words)


@pytest.mark.parametrize("key", ["sesame\r", "\ufeffsesame", "sésame", "sesame "])
def test_key_that_no_header_carries(key):
    """Said before anything is sent, and not as the server's fault."""
    with pytest.raises(Refused, match=r"the API key \(VLLM_API_KEY, .*\): .*remove it"):
        Server("ws://127.0.0.1:9/v1/realtime", key)
    assert Server("ws://127.0.0.1:9/v1/realtime", "my se-same_1.").headers


def test_the_key_goes_to_no_other_server():
    """A redirection is not followed, neither of the list of models nor of the WebSocket."""
    asked = []

    class Elsewhere(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/stolen")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    async def run(server: Server) -> None:
        with pytest.raises(Refused, match=r"redirects to http://localhost:.*/stolen, which is not followed"):
            await server.models()
        with pytest.raises(Refused, match=r"redirects to http://localhost:.*/stolen, which is not followed"):
            async with server.session("m"):
                pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as listening:
        threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            asyncio.run(run(Server(f"ws://127.0.0.1:{listening.server_port}", "sesame")))
        finally:
            listening.shutdown()
    assert asked == ["/v1/models", "/v1/realtime"]


# --- no hang ---


@pytest.mark.parametrize(("stall", "said"), [(0.5, r"0\.5"), (transcriber.STALL_SECONDS, "1")])
def test_server_that_accepts_and_never_answers(monkeypatch, stall, said):
    """It is given up in time, also where a stall would be longer."""
    monkeypatch.setattr(transcriber, "STALL_SECONDS", stall)

    async def run() -> None:
        async with ScriptedServer(answers=False) as server:
            with pytest.raises(GaveUp, match=rf"gave up after 1 s: no answer for {said} s"):
                await transcribe(server, pieces(tones(9)), give_up_after=1)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_server_that_breaks_at_the_same_place_every_time():
    """Deltas come in every session, but never further ones: that is no progress."""

    async def run() -> None:
        async with ScriptedServer(hearing(), cuts=[60] + [20] * 1000) as server:
            with pytest.raises(GaveUp, match="connection lost"):
                await transcribe(server, pieces(tones(20, gap=0.1)), give_up_after=2)
            assert len(server.sessions) > 2

    asyncio.run(asyncio.wait_for(run(), 60))


def test_server_whose_sessions_are_too_short_for_a_word(monkeypatch):
    monkeypatch.setattr(transcriber, "STALL_SECONDS", 0.5)

    async def run() -> None:
        async with ScriptedServer(lambda: Scripted(limit=2)) as server:
            with pytest.raises(GaveUp, match="before any word was final"):
                await transcribe(server, pieces(tones(3)), give_up_after=1)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_greeting_that_does_not_come(monkeypatch):
    """A lost connection: the next one may be better."""
    monkeypatch.setattr(session, "ANSWER_SECONDS", 0.5)

    async def run() -> tuple[list[Word], list[str]]:
        async with ScriptedServer(hearing(), greets=False) as server:
            asyncio.get_running_loop().call_later(1.0, setattr, server, "greets", True)
            return await transcribe(server, pieces(tones(3)))

    words, told = asyncio.run(asyncio.wait_for(run(), 60))
    assert any("no session.created" in message for message in told)
    assert text(words) == " number0 number1 number2"


def test_pause_of_the_input_is_no_failure():
    """The server ends idle sessions again and again while the input pauses for longer than --give-up-after."""
    samples = tones(6)

    async def chunks() -> AsyncIterator[bytes]:
        async for pcm in pieces(samples[: 3 * RATE]):
            yield pcm
        for _ in range(4):
            await asyncio.sleep(1.5)
            servers[0].cut()
        async for pcm in pieces(samples[3 * RATE :]):
            yield pcm

    async def run() -> list[Word]:
        async with ScriptedServer(hearing()) as server:
            servers.append(server)
            return (await transcribe(server, chunks(), give_up_after=4, live=True))[0]

    servers: list[ScriptedServer] = []
    assert text(asyncio.run(asyncio.wait_for(run(), 60))).split() == [word.strip() for word in DIGITS[:6]]
    assert len(servers[0].sessions) > 2


@pytest.mark.parametrize("live", [True, False])
def test_connection_that_takes_no_more_audio(monkeypatch, live):
    """Half-open: nothing fails, but after a second of audio no buffer has room."""
    send, blocked = session.Session.send, []

    async def stuck(self, pcm: bytes) -> None:
        self.sent = getattr(self, "sent", 0) + len(pcm)
        if self.sent > 2 * RATE and blocked in ([], [self]):
            blocked[:] = [self]
            await asyncio.Event().wait()
        await send(self, pcm)

    monkeypatch.setattr(session.Session, "send", stuck)
    monkeypatch.setattr(transcriber, "STALL_SECONDS", 1)

    async def talk() -> AsyncIterator[bytes]:
        async for pcm in pieces(tones(8)):
            yield pcm
        while not any("no answer for 1 s" in message for message in told):
            await asyncio.sleep(0.05)

    async def run() -> list[Word]:
        async with ScriptedServer(hearing()) as server:
            return (await transcribe(server, talk(), told, live=live))[0]

    told: list[str] = []
    assert text(asyncio.run(asyncio.wait_for(run(), 30))) == "".join(DIGITS[:8])


def test_words_on_the_screen_stay_until_another_session_answers():
    """And only sessions that the server granted are counted."""
    busy = {"after": 0, "error": "The engine is currently busy", "code": "processing_error"}
    seen: list[int] = []

    async def run() -> None:
        async with ScriptedServer(hearing(), faults=[{"after": 40}, {"gone": True}, busy]) as server:

            def notify(state: str, message: str) -> None:
                seen.append(len(client.partial))

            client = Transcriber(Server(server.url), notify=notify)
            await client.open()
            words = [word async for word in client.words(pieces(tones(12, gap=0.06)))]
            assert text(words) == "".join(DIGITS[:12])
            assert not any(word.partial for word in words)
            assert (client.sessions, len(server.sessions)) == (2, 3)

    asyncio.run(asyncio.wait_for(run(), 60))
    first, *_ = filter(None, seen)
    assert seen.count(first) >= 5  # lost, not there, listening, busy, listening
    assert first >= 3


def test_fault_of_the_sending_side_reaches_the_user(monkeypatch):
    async def broken(self, pcm: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(session.Session, "send", broken)

    async def run() -> None:
        async with ScriptedServer() as server:
            with pytest.raises(ZeroDivisionError):
                await transcribe(server, pieces(tones(3)))

    asyncio.run(asyncio.wait_for(run(), 60))


# --- the way in ---


def refused(url: str, key: str | None = None) -> tuple[str, str]:
    """Return how the question for the models and the WebSocket are refused."""

    async def run() -> tuple[str, str]:
        server = Server(url, key)
        with pytest.raises((Refused, SessionLost)) as asked:
            await server.models()
        with pytest.raises((Refused, SessionLost)) as opened:
            async with server.session("scripted"):
                pass
        return str(asked.value), str(opened.value)

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_wrong_key_and_wrong_path_are_told_apart():
    with scripted(key="sesame") as server:
        for answer in refused(server.url, "wrong"):
            assert "wrong API key (HTTP 401)" in answer
            assert "path" not in answer
        for answer in refused(server.url.replace("realtime", "other"), "sesame"):
            assert "wrong path, or origin not allowed (HTTP 403)" in answer
            assert "key" not in answer


@pytest.mark.parametrize(("status", "ends"), [(404, False), (429, False), (502, False), (401, True), (403, True)])
def test_refusals_after_a_session_was_granted(status, ends):
    """A proxy answers anything while the server behind it starts again; but the key and the origin are the client's."""

    async def run() -> list[Word]:
        async with ScriptedServer(hearing(), faults=[{"after": 30}, {"http": status}]) as server:
            return (await transcribe(server, pieces(tones(6))))[0]

    if ends:
        with pytest.raises(Refused, match=f"HTTP {status}"):
            asyncio.run(asyncio.wait_for(run(), 60))
    else:
        assert text(asyncio.run(asyncio.wait_for(run(), 60))) == "".join(DIGITS[:6])


def test_server_that_says_why_and_how_long():
    """At least so long: the usual first wait is 0.75 s at most."""
    full = {"http": 503, "reason": "too many\nWebSockets", "retry": "2"}

    async def run() -> tuple[list[Word], list[str], float]:
        async with ScriptedServer(hearing(), faults=[full]) as server:
            begun = asyncio.get_running_loop().time()
            return *await transcribe(server, pieces(tones(2))), asyncio.get_running_loop().time() - begun

    words, told, took = asyncio.run(asyncio.wait_for(run(), 60))
    assert (text(words), took >= 2) == (" number0 number1", True)
    assert any(r"too many\nWebSockets (HTTP 503); trying again" in message for message in told)


def test_slash_at_the_end_of_the_address():
    async def run() -> str:
        async with ScriptedServer(hearing()) as server:
            server.url += "//"
            return text((await transcribe(server, pieces(tones(2))))[0])

    assert asyncio.run(run()) == " number0 number1"


FAR = "8.8.8.8:8000"  # an address of the internet: nothing is sent there but through the tests' own proxy


class HttpProxy:
    """An HTTP proxy in the server's loop that leads everything to one port; `status`: what it answers instead."""

    def __init__(self, port: int, status: int = 0):
        self.target, self.status, self.asked = port, status, []

    async def __aenter__(self) -> "HttpProxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head.split("\r\n")[0])
        with contextlib.suppress(ConnectionError):
            if self.status:
                writer.write(f"HTTP/1.1 {self.status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                return writer.close()
            back, forth = await asyncio.open_connection("127.0.0.1", self.target)
            if head.startswith("CONNECT"):
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                forth.write(head.replace(f"http://{FAR}", "").encode())
            await asyncio.gather(_pipe(reader, forth), _pipe(back, writer))


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()


@pytest.fixture
def proxies(monkeypatch):
    """Sets the variables of proxies; none is set before."""
    for name in ("http", "https", "all", "ws", "wss", "socks", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROXY", raising=False)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "HTTPS_PROXY", "https_proxy"])
def test_proxy_is_not_asked_for_this_machine(proxies, variable):
    """No proxy elsewhere leads to loopback; here it would not even answer."""
    proxies(**{variable: f"http://127.0.0.1:{free_port()}"})

    async def run() -> str:
        async with ScriptedServer(hearing()) as server:
            return text((await transcribe(server, pieces(tones(2))))[0])

    assert asyncio.run(run()) == " number0 number1"


@pytest.mark.parametrize("host", ["10.1.2.3", "192.168.0.9", "[fd00::1]", "[::1]", "169.254.1.1", "localhost"])
def test_private_addresses_need_no_proxy(proxies, host):
    proxies(HTTP_PROXY="http://127.0.0.1:3128", HTTPS_PROXY="http://127.0.0.1:3128")
    assert proxy_for(f"ws://{host}:8000") is None
    assert proxy_for(f"wss://{host}:8000") is None


def test_proxy_is_used_for_the_internet(proxies):
    async def run() -> tuple[str, list[str]]:
        async with ScriptedServer(hearing()) as server, HttpProxy(server.port) as proxy:
            proxies(HTTP_PROXY=proxy.address)  # without http://, as many write it
            server.url = f"ws://{FAR}/v1/realtime"
            return text((await transcribe(server, pieces(tones(2))))[0]), proxy.asked

    words, asked = asyncio.run(run())
    assert words == " number0 number1"
    assert asked == [f"GET http://{FAR}/v1/models HTTP/1.1", f"CONNECT {FAR} HTTP/1.1"]


def test_proxy_is_named_where_it_fails(proxies):
    nobody = f"127.0.0.1:{free_port()}"
    proxies(HTTP_PROXY=f"http://user:secret@{nobody}")
    for answer in refused(f"ws://{FAR}"):
        assert f"through the proxy {nobody} (HTTP_PROXY; without it: NO_PROXY=8.8.8.8)" in answer
        assert "secret" not in answer
        assert "serve.sh" not in answer


@pytest.mark.parametrize(
    ("status", "said"), [(503, "returned an error (HTTP 503)"), (407, "a name and a password"), (403, "403")]
)
def test_proxy_that_refuses_is_named(proxies, status, said):
    async def run() -> tuple[str, str]:
        async with HttpProxy(0, status) as proxy:
            proxies(HTTP_PROXY=f"http://{proxy.address}")
            return await asyncio.to_thread(refused, f"ws://{FAR}")

    for answer in asyncio.run(run()):
        assert said in answer
        assert "through the proxy 127.0.0.1" in answer


@pytest.mark.parametrize(("proxy", "said"), [("socks5h://127.0.0.1:1080", "SOCKS"), ("gopher://x", "not the address")])
def test_proxy_that_cannot_be_used(proxies, proxy, said):
    proxies(HTTPS_PROXY=proxy)
    for answer in refused(f"ws://{FAR}"):
        assert said in answer
        assert "HTTPS_PROXY" in answer
        assert "\n" not in answer
