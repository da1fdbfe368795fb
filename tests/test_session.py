"""Sessions with a scripted server: nothing hangs, what is refused is said, every script keeps its spaces."""

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from clients import NOT_PYTHON, dart, drive, needs_dart
from conftest import CHECKPOINT, ROOT, free_port, run_script
from proxy import Proxy
from scripted import Ear, Scripted, ScriptedServer, scripted, tones

from voxtral_client import session
from voxtral_client.audio import to_pcm16
from voxtral_client.protocol import RATE
from voxtral_client.proxies import proxy_for
from voxtral_client.session import Refused, Server, SessionLost
from voxtral_client.timeline import Word
from voxtral_client.transcriber import GaveUp, Transcriber

SAMPLE = CHECKPOINT / "sample.wav"
DIGITS = [f" number{i}" for i in range(190)]


def hearing(texts: list[str] = DIGITS, bare: bool = False):
    """What makes the sessions of a server that understands `tones`."""
    return lambda: Scripted(speak=Ear(texts, bare))


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


# --- sessions one after the other ---

SCRIPTS = {  # eight words in each of the model's languages
    "Arabic": "مرحبا كيف حالك اليوم أنا بخير شكرا لك",
    "Chinese": "你好 世界 今天 天气 很好 我们 去 公园",
    "Dutch": "goedemorgen hoe gaat het met jou vandaag dan",
    "English": "good morning how are you doing today then",
    "French": "bonjour ça va très bien merci à tous",
    "German": "guten Morgen wie geht es dir heute früh",
    "Hindi": "नमस्ते आप कैसे हैं मैं ठीक हूँ धन्यवाद",
    "Italian": "buongiorno come stai oggi perché è già tardi",
    "Japanese": "今日は とても いい 天気 ですね 公園へ 行き ましょう",
    "Korean": "안녕하세요 오늘은 날씨가 아주 좋네요 우리 같이 산책해요",
    "Portuguese": "olá como você está hoje não é bom",
    "Russian": "доброе утро как у вас дела сегодня вечером",
    "Spanish": "¿cómo estás hoy? ¡qué día más bonito hace!",
}
BRIEF = {"max_model_len": 60}  # sessions of 2.4 s: they roll over again and again


def words_of(language: str) -> list[str]:
    """The language's words as the model writes them: Chinese and Japanese without spaces."""
    space = "" if language in ("Chinese", "Japanese") else " "
    return [space + word for word in SCRIPTS[language].split()]


@contextlib.asynccontextmanager
async def babel() -> AsyncIterator[dict[tuple[str, bool], ScriptedServer]]:
    """A server for each language and for each way of beginning a session; the first session of each breaks."""
    async with contextlib.AsyncExitStack() as stack:
        yield {
            (language, bare): await stack.enter_async_context(
                ScriptedServer(hearing(words_of(language), bare), entry=BRIEF, cuts=[22])
            )
            for language in SCRIPTS
            for bare in (False, True)
        }


def assert_spaces(servers: dict[tuple[str, bool], ScriptedServer], texts: list[str]) -> None:
    for ((language, bare), server), got in zip(servers.items(), texts, strict=True):
        assert len(server.sessions) >= 3, language  # one that broke, one that rolled over
        assert got.strip() == "".join(words_of(language)).strip(), (language, "bare" if bare else "")


def test_every_script_keeps_its_spaces():
    """At a resume and at rollovers, whether or not a session begins with a space."""

    async def run() -> None:
        async with babel() as servers:
            runs = [transcribe(server, pieces(tones(8, gap=1.2))) for server in servers.values()]
            assert_spaces(servers, [text(words) for words, _ in await asyncio.gather(*runs)])

    asyncio.run(asyncio.wait_for(run(), 200))


@pytest.fixture
def audio(tmp_path):
    """Writes samples as bare PCM16 for `drive`."""

    def write(samples: np.ndarray) -> Path:
        path = tmp_path / f"{len(samples)}.pcm"
        path.write_bytes(to_pcm16(samples))
        return path

    return write


@pytest.mark.parametrize("client", NOT_PYTHON)
def test_every_script_keeps_its_spaces_in_every_client(audio, client):
    async def run() -> None:
        async with babel() as servers:
            jobs = [{"url": server.url, "path": audio(tones(8, gap=1.2))} for server in servers.values()]
            results = await asyncio.to_thread(drive, client, *jobs)
            assert_spaces(servers, [result["text"] for result in results])

    asyncio.run(asyncio.wait_for(run(), 250))


ENTRIES = [  # what /v1/models says, and how many sessions three minutes of talk take then
    ({}, 3),  # stock vLLM
    ({"voxtral_speed": True}, 1),
    ({"voxtral_speed": True, "max_model_len": 2048}, 3),
]


@pytest.mark.parametrize("client", ["python", *NOT_PYTHON])
def test_rollover_depends_on_the_server(audio, client):
    """A session of a stock server gets slower as it grows; one that does not is left in peace, as /v1/models says."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(scripted(hearing(), entry=entry)) for entry, _ in ENTRIES]
        results = drive(client, *[{"url": server.url, "path": audio(tones(180))} for server in servers])
        assert [result["text"] for result in results] == ["".join(DIGITS[:180])] * 3
        assert [len(server.sessions) for server in servers] == [sessions for _, sessions in ENTRIES]


@pytest.mark.parametrize("client", ["python", *NOT_PYTHON])
def test_talk_without_a_pause_rolls_over_between_words(audio, client):
    """Before the longest session of a server whose frames all cost the same."""
    with scripted(hearing(), entry={"voxtral_speed": True, "max_model_len": 1024}) as server:
        (result,) = drive(client, {"url": server.url, "path": audio(tones(180, gap=0.06))})
        assert result["text"] == "".join(DIGITS[:180])
        assert len(server.sessions) == 2


# --- the clients that are not Python ---


@pytest.mark.parametrize("client", NOT_PYTHON)
def test_what_is_refused_is_said_and_does_not_end_the_app(audio, client):
    with scripted(hearing(), key="sesame") as server, scripted() as open_server, scripted(garbles=True) as foreign:
        elsewhere = open_server.url.replace("/v1/realtime", "/other/realtime")
        slash = "" if client == "captions" else "/"  # the page finds the address by itself
        jobs = [
            {"url": server.url, "key": "wrong"},
            {"url": server.url},
            {"url": elsewhere},
            {"url": foreign.url},
            {"url": server.url + slash, "key": "sesame"},
        ]
        *bad, good = drive(client, *[job | {"path": audio(tones(2))} for job in jobs])
        assert [result["end"] for result in bad] == ["refused"] * 4
        assert [result["message"] for result in bad] == [
            "wrong API key (HTTP 401)",
            "the server wants a key (HTTP 401)",
            "wrong path, or an origin that is not let in (HTTP 403)",
            "a message was not JSON",
        ]
        assert (good["end"], good["text"]) == ("done", " number0 number1")
        assert len(server.sessions) == 1


@pytest.mark.parametrize("client", NOT_PYTHON)
def test_no_progress_ends_in_giving_up(audio, client):
    """Servers that accept and never answer, never greet, are full of faults, or are not there."""
    with scripted(answers=False) as mute, scripted(greets=False) as rude, scripted(refusal=503) as ill:
        urls = [mute.url, rude.url, ill.url, f"ws://127.0.0.1:{free_port()}/v1/realtime"]
        times = {"giveUp": 1, "stall": 1, "answer": 0.5}
        for result in drive(client, *[times | {"url": url, "path": audio(tones(5))} for url in urls]):
            assert (result["end"], result["text"], result["message"][:8]) == ("gave up", "", "gave up:")
            assert "waiting" in result["states"]


@pytest.mark.parametrize("client", NOT_PYTHON)
def test_server_that_is_absent_full_and_restarted(audio, client):
    """Nothing answers at first; all sessions are taken; connections break during speech; nothing answers again."""
    gone, busy = {"gone": True}, {"after": 0, "error": "The engine is currently busy", "code": "processing_error"}
    faults = [gone, gone, busy, {"after": 40}, gone, {"after": 20, "drop": True}, {"after": 25, "close": 1012}]
    with scripted(hearing(), faults=faults) as server:
        (result,) = drive(client, {"url": server.url, "path": audio(tones(20))})
        assert (result["end"], result["text"]) == ("done", "".join(DIGITS[:20]))
        assert len(server.sessions) == 5
        told = "; ".join(result["told"])
        assert [told.count(text) for text in ("no server answers", "all sessions of the server are taken")] == [3, 1]
        assert told.count("connection lost") == 3


@pytest.mark.parametrize("client", NOT_PYTHON)
def test_connection_that_freezes(audio, client):
    """Nothing passes any more, not even the closing of the connection; the next one is not held up."""

    async def run() -> dict:
        async with ScriptedServer(hearing()) as server, Proxy(server.port, [(40, "stall")]) as proxy:
            job = {"url": proxy.url, "path": audio(tones(8)), "stall": 3}
            (result,) = await asyncio.to_thread(drive, client, job)
            return result | {"sessions": proxy.sessions}

    result = asyncio.run(asyncio.wait_for(run(), 60))
    assert (result["end"], result["text"], result["sessions"]) == ("done", "".join(DIGITS[:8]), 2)
    assert result["told"] == ["no answer for 3 s; trying again"]


# --- examples/client.dart from the command line ---


def run_dart(*arguments: object) -> subprocess.CompletedProcess:
    command = [*dart("examples/client.dart"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@needs_dart
@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], 2), (["/no/such.wav"], 1), ([ROOT / "PROTOCOL.md"], 1), ([SAMPLE, "http://x"], 1), ([SAMPLE, "ws://["], 1)],
)
def test_dart_mistakes(arguments, status):
    result = run_dart(*arguments)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (status, "", 1), result.stderr


@needs_dart
def test_dart_hears_what_python_hears(server):
    """The sample, on a real server; words and their ends."""
    result = run_dart(SAMPLE, server.url)
    assert (result.returncode, result.stderr) == (0, "")
    ours = [line.split() for line in result.stdout.splitlines()]
    options = ("--url", server.url, "--parallel", 1, "-f", "jsonl", "-o", "-")
    python = run_script("test_file_transcribe.py", *options, SAMPLE)
    theirs = [entry for entry in map(json.loads, python.stdout.splitlines()) if "text" in entry]
    assert [word for _, word in ours] == [entry["text"].strip() for entry in theirs]
    assert max(abs(float(end) - entry["end"]) for (end, _), entry in zip(ours, theirs, strict=True)) < 0.25
