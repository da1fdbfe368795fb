"""Sessions with a scripted server: nothing hangs, what is refused is said."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest
from conftest import free_port
from scripted import DIGITS, Scripted, ScriptedServer, hearing, scripted, tones

from voxtral_client import session
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


async def transcribe(server: ScriptedServer, chunks: AsyncIterator[bytes], **options) -> tuple[list[Word], list[str]]:
    """Return the words, and what the user was told."""
    told: list[str] = []
    transcriber = Transcriber(Server(server.url), notify=lambda state, message: told.append(message), **options)
    await transcriber.open()
    return [word async for word in transcriber.words(chunks)], told


def text(words: list[Word]) -> str:
    return "".join(word.text for word in words)


# --- no hang ---


def test_server_that_accepts_and_never_answers():
    async def run() -> None:
        async with ScriptedServer(answers=False) as server:
            with pytest.raises(GaveUp, match=r"gave up after 1 s: no answer for 0\.5 s"):
                await transcribe(server, pieces(tones(3)), give_up_after=1, stall_after=0.5)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_server_that_breaks_at_the_same_place_every_time():
    """Deltas come in every session, but never further ones: that is no progress."""

    async def run() -> None:
        async with ScriptedServer(hearing(), cuts=[60] + [20] * 1000) as server:
            with pytest.raises(GaveUp, match="connection lost"):
                await transcribe(server, pieces(tones(20, gap=0.1)), give_up_after=2)
            assert len(server.sessions) > 2

    asyncio.run(asyncio.wait_for(run(), 60))


def test_server_whose_sessions_are_too_short_for_a_word():
    async def run() -> None:
        async with ScriptedServer(lambda: Scripted(limit=2)) as server:
            with pytest.raises(GaveUp, match="before any word was final"):
                await transcribe(server, pieces(tones(3)), give_up_after=1, stall_after=0.5)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_greeting_that_does_not_come(monkeypatch):
    """A lost connection: the next one may be better."""
    monkeypatch.setattr(session, "ANSWER_SECONDS", 0.5)

    async def run() -> tuple[list[Word], list[str]]:
        async with ScriptedServer(hearing(), greets=False) as server:
            asyncio.get_running_loop().call_later(1.0, setattr, server, "greets", True)
            return await transcribe(server, pieces(tones(3)))

    words, told = asyncio.run(asyncio.wait_for(run(), 60))
    assert any("did not greet" in message for message in told)
    assert text(words) == " number0 number1 number2"


def test_pause_of_the_input_is_no_failure():
    """The server ends idle sessions again and again while the input pauses for longer than --give-up-after."""
    samples = tones(6)

    async def chunks() -> AsyncIterator[bytes]:
        async for pcm in pieces(samples[: 3 * RATE]):
            yield pcm
        for _ in range(4):
            await asyncio.sleep(1)
            servers[0].cut()
        async for pcm in pieces(samples[3 * RATE :]):
            yield pcm

    async def run() -> list[Word]:
        async with ScriptedServer(hearing()) as server:
            servers.append(server)
            return (await transcribe(server, chunks(), give_up_after=1.5, live=True))[0]

    servers: list[ScriptedServer] = []
    assert text(asyncio.run(asyncio.wait_for(run(), 60))).split() == [word.strip() for word in DIGITS[:6]]
    assert len(servers[0].sessions) > 2


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
            assert "wrong path, or an origin that is not let in (HTTP 403)" in answer
            assert "key" not in answer


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


@pytest.mark.parametrize(("status", "said"), [(503, "not well"), (407, "a name and a password"), (403, "403")])
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
