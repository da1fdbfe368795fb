"""Who gets in, and how much they may ask for: vllm_plugin/voxtral_web/guard.py and limits.py."""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack

import httpx2
import numpy as np
import psutil
import pytest
import websockets
from servers import ROOT
from speech import talk
from test_protocol import FINAL, START, TEXT, UPDATE, Client, append
from voxtral_web import page
from voxtral_web.guard import Guard
from voxtral_web.limits import MESSAGE_BYTES, WAITING_BYTES, Limited
from websockets.exceptions import InvalidStatus

from voxtral_client.audio import to_pcm16
from voxtral_client.session import Server
from voxtral_client.transcriber import Transcriber

# --- routes ---

ASK_EVERY_ROUTE = """
import json
from typing import get_args
from starlette.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.tasks import SupportedTask
from vllm.utils.argparse_utils import FlexibleArgumentParser

tasks = [task for part in get_args(SupportedTask) for task in get_args(part) or [part]]
options = ["--middleware", "voxtral_web.guard.Guard", "--enable-fault-tolerance"]
app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args(options), tuple(tasks))
client = TestClient(app, raise_server_exceptions=False)
answers = []
for route in app.routes:
    for method in sorted(getattr(route, "methods", None) or ["GET"]):
        for key in ({}, {"Authorization": "Bearer sesame"}):
            answer = client.request(method, route.path, headers=key)
            refused = answer.status_code in (404, 501) and "x-should-retry" in answer.headers
            answers.append([route.path, method, "refused" if refused else answer.status_code])
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_every_route_of_vllm():
    """vLLM's own app with all routes that it can mount, those for its developers included: the rest is refused."""
    web = {"VLLM_PLUGINS": "voxtral_web", "VOXTRAL_WEB": str(ROOT / "web")}
    environment = os.environ | web | {"VLLM_API_KEY": "sesame", "VLLM_SERVER_DEV_MODE": "1"}
    command = [sys.executable, "-c", ASK_EVERY_ROUTE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    assert len({path for path, _, _ in answers}) > 50
    let_in = {}
    for path, method, answer in answers:
        if answer != "refused":
            let_in.setdefault(f"{method} {path}", []).append(answer)
    # Without a key, and with it. No engine is there: what asks for one fails with 500.
    assert {route: answers[0] == 401 for route, answers in let_in.items()} == {
        "GET /v1/models": True,
        "POST /v1/audio/transcriptions": True,
        "GET /v1/realtime": True,
        "GET /v1/audio/transcriptions/realtime": True,
        "GET /captions": False,
        "GET /health": False,
        "GET /metrics": False,
        "GET /version": False,
        "GET /ping": False,
        "POST /ping": False,
    }
    # Each route is asked without a key, then with it. A WebSocket of vLLM is hidden by ours, other routes are replaced.
    assert all(401 not in answers[1::2] for answers in let_in.values())
    assert len(let_in["GET /v1/models"]) == len(let_in["POST /v1/audio/transcriptions"]) == 2
    for route in let_in:
        assert f"`{route.split()[1]}" in TEXT, route


# --- the guard by itself ---


def ask(guard: Guard, kind: str = "http", path: str = "/v1/models", method: str = "GET", **headers: str) -> object:
    """Return what it answers: None where the application behind it is reached, else status and message."""
    names = {key.replace("_", "-"): value for key, value in headers.items()}
    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in names.items()],
        "client": ("192.0.2.1", 5),
        "extensions": {"websocket.http.response": {}},
    }
    if kind == "websocket":
        del scope["method"]
    sent, reached = [], []

    async def application(*_: object) -> None:
        reached.append(True)

    async def send(message: dict) -> None:
        sent.append(message)

    guard.app = application
    asyncio.run(guard(scope, None, send))
    if reached:
        return None
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]["message"]


@pytest.fixture
def guard(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Box.example.org")
    monkeypatch.setenv("ALLOWED_HOSTS", "speech.example.com https://talk.example.com:8000/")
    monkeypatch.setenv("ALLOWED_ORIGINS", "https://friend.example/")
    return Guard(None)


OURS = "127.0.0.1 192.168.1.5:8000 [fe80::1]:8000 localhost:8000 localhost. BOX box.local:8000 box.lan box.home.arpa "
OURS += "box.internal box.example.org speech.example.com talk.example.com:8000"
THEIRS = "evil.example evil.example:8000 box.evil.example 127.0.0.1.evil.example evil.local localhost.evil.example ["


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_hosts(guard, kind):
    """Only where nobody else can own the name do `Host` and `Origin` of a browser say where its page comes from."""
    path = "/v1/realtime" if kind == "websocket" else "/v1/models"
    for host in OURS.split():
        for scheme in ("http", "https"):
            assert ask(guard, kind, path, host=host, origin=f"{scheme}://{host.lower()}") is None, host
        status, message = ask(guard, kind, path, host=host, origin="http://evil.example")
        assert (status, "ALLOWED_ORIGINS" in message) == (403, True)
    for host in [*THEIRS.split(), ""]:
        status, message = ask(guard, kind, path, host=host, origin=f"http://{host}")
        assert (status, "ALLOWED_HOSTS" in message) == (403, True), host
        assert ask(guard, kind, path, host=host) is None, host  # no Origin: no browser
        assert ask(guard, kind, path, host=host, origin="https://friend.example") is None
    for origin in ("null", "http://127.0.0.1:80", "http://[", "127.0.0.1"):
        assert ask(guard, kind, path, host="127.0.0.1", origin=origin)[0] == 403


def test_page_under_a_foreign_name_is_told(guard):
    """Its script's GET has no Origin; the WebSocket's refusal it could not see."""
    status, message = ask(guard, host="evil.example", sec_fetch_site="same-origin")
    assert (status, "ALLOWED_HOSTS" in message) == (403, True)
    assert ask(guard, host="box.local", sec_fetch_site="same-origin") is None
    assert ask(guard, host="evil.example", sec_fetch_site="none") is None  # typed by a person
    for path in ("/captions/", "/captions/page.js"):  # or it could say nothing
        assert ask(guard, path=path, host="evil.example", origin="https://evil.example") is None


def test_other_paths(guard):
    for path in ("/", "/docs", "/tokenize", "/v1/models/", "/v1/realtime/", "//v1/models", "/captionsx", "/v1/MODELS"):
        assert ask(guard, path=path)[0] == 404, path
        assert ask(guard, "websocket", path)[0] == 404, path
    status, message = ask(guard, path="/v1/audio/translations", method="POST")
    assert (status, "/v1/audio/transcriptions" in message) == (501, True)
    assert ask(guard, path="/v1/realtime") is None


def test_only_the_realtime_route_takes_a_websocket(guard):
    """Others ended in a traceback of vLLM's, or passed without a look at the page's site."""
    for path in ("/metrics/x", "/captions/", "/v1/models", "/v1/audio/transcriptions"):
        assert ask(guard, "websocket", path, origin="https://evil.example")[0] == 404, path
    assert ask(guard, "websocket", "/v1/realtime") is None


def test_speed_is_told(monkeypatch):
    """In /v1/models: clients need not change sessions so often then."""
    for on in (["features", "rows"], ["rows"]):
        monkeypatch.setattr(page.voxtral_speed, "active", on.__contains__)
        assert page.speed_is_active() == ("features" in on)


class Wire:
    """An ASGI connection: what the client sends, and what was sent to it."""

    def __init__(self, *messages: object):
        self.incoming: asyncio.Queue[dict] = asyncio.Queue()
        for message in messages:
            self.put(message)
        self.sent: list[dict] = []
        self.broken = False  # the client is gone

    def put(self, message: object) -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        self.incoming.put_nowait({"type": "websocket.receive", "text": text})

    async def send(self, message: dict) -> None:
        if self.broken:
            raise ConnectionResetError  # as uvicorn does
        self.sent.append(message)


def limited(wire: Wire, idle: float = 600) -> Limited:
    return Limited(wire.incoming.get, wire.send, idle, None, False)


async def drain(connection: Limited) -> dict:
    """Receive as an application does until nothing comes for a moment; return the last message."""
    message = {}
    with contextlib.suppress(TimeoutError):
        while message.get("type") != "websocket.disconnect":
            message = await asyncio.wait_for(connection.receive(), 0.2)
    return message


SECOND = append(bytes(32000))


def test_audio_that_nobody_asked_for():
    """What was sent before the start, and what is no audio, is bounded too."""

    async def run(*messages: object) -> tuple[int, int]:
        wire = Wire(*messages)
        await drain(limited(wire))
        return wire.incoming.qsize(), wire.sent[-1]["code"]

    finals = [json.dumps(FINAL)] * (WAITING_BYTES // 64 + 100)
    samples = [json.dumps(append(bytes(2)))] * (WAITING_BYTES // 256 + 100)
    for messages in ([SECOND] * 100, finals, samples):
        left, code = asyncio.run(run(*messages))
        assert (left > 0, code) == (True, 4413)


def test_audio_waits_for_deltas(monkeypatch):
    """No more is received until there is room; 4413 where none comes. A disconnection is heard all the same."""
    monkeypatch.setattr("voxtral_web.limits.STALL_SECONDS", 1.0)
    monkeypatch.setattr("voxtral_web.limits.AHEAD_BYTES", 40 * 32000)
    delta = {"type": "websocket.send", "text": '{"type":"transcription.delta","delta":""}'}
    busy = {"type": "websocket.send", "text": '{"type":"error","error":"busy","code":"processing_error"}'}
    no_model = {"type": "websocket.send", "text": busy["text"].replace("processing_error", "model_not_validated")}

    async def run() -> None:
        wire = Wire(START, *[SECOND] * 100)
        connection = limited(wire)
        await drain(connection)
        held = 100 - wire.incoming.qsize()
        assert held == 40
        receiving = asyncio.create_task(connection.receive())
        for _ in range(12 * 13):
            await connection.send(delta)
        await receiving
        await drain(connection)
        assert 100 - wire.incoming.qsize() - held in (12, 13)
        await connection.send({"type": "websocket.send", "text": '{"type":"transcription.done","text":""}'})
        left = wire.incoming.qsize()
        assert (await drain(connection))["type"] == "websocket.disconnect"  # room again, but not begun anew
        assert (left - wire.incoming.qsize(), wire.sent[-1]["code"]) == (33, 4413)

        connection = limited(Wire(START, *[SECOND] * 38))
        await connection.receive()
        await connection.send(no_model)
        assert (await drain(connection))["code"] == 4413  # not as much as while one runs

        connection = limited(wire := Wire(START, *[SECOND] * 100))
        while not wire.sent:
            await connection.receive()
        assert wire.sent[-1]["code"] == 4413

        connection = limited(wire := Wire(START, *[SECOND] * 38))
        await drain(connection)
        await connection.send(busy)  # more than may wait without a transcription
        assert (await connection.receive())["code"] == 4413

        wire = Wire(START, *[SECOND] * 50)
        connection = limited(wire)
        await drain(connection)
        wire.broken = True
        receiving = asyncio.create_task(connection.receive())
        await asyncio.sleep(0)
        with pytest.raises(ConnectionResetError):
            await connection.send(delta)
        await asyncio.wait_for(receiving, 0.5)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("query", "bounded"),
    [
        ("", True),
        ("intent=transcription", False),
        ("intent=transcription&intent=", True),
        ("intent=x&intent=transcription", False),
    ],
)
def test_limits_are_those_of_the_protocol_that_answers(guard, query, bounded):
    """The last `intent` counts, also an empty one. Only a dialect bounds by itself what waits."""
    wire = Wire(*[SECOND] * 100)
    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "query_string": query.encode()}

    async def application(_scope, receive, _send) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                while (await receive())["type"] != "websocket.disconnect":
                    pass

    guard.app = application
    asyncio.run(guard(scope, wire.incoming.get, wire.send))
    assert [message.get("code") for message in wire.sent] == [4413] * bounded


@pytest.mark.slow
def test_long_session_of_small_messages(monkeypatch):
    """What is counted for messages and given back for deltas stays together over hours: later as much may wait."""
    monkeypatch.setattr("voxtral_web.limits.AHEAD_BYTES", 100 * 640)

    async def taken(frames: int) -> int:
        """How many messages of 20 ms are received ahead after so many frames of 80 ms."""
        wire = Wire(START)
        connection = limited(wire)
        delta = {"type": "websocket.send", "text": '{"type":"transcription.delta","delta":" \\"type\\":"}'}
        for _ in range(frames):
            for _ in range(4):
                wire.put(json.dumps(append(bytes(640))))
                await connection.receive()
            await connection.send(delta)
        for _ in range(200):
            wire.put(json.dumps(append(bytes(640))))
        await drain(connection)
        return 200 - wire.incoming.qsize()

    early, late = asyncio.run(taken(1)), asyncio.run(taken(20_000))
    assert 100 <= early <= 102
    assert abs(late - early) <= 1


# --- against the server ---


def memory(port: int) -> int:
    """Bytes that the API server on this port holds."""
    listeners = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
    return psutil.Process(listeners[0].pid).memory_info().rss


def test_greedy_clients(server):
    """Clients that try to fill the server's memory and its sockets, while another one's captions go on."""
    samples, spoken = talk(8, seed=31)
    pcm = to_pcm16(samples)
    codes = []

    async def microphone() -> list[str]:
        async def chunks():
            for at in range(0, len(pcm), 3200):
                yield pcm[at : at + 3200]
                await asyncio.sleep(0.1)

        transcriber = Transcriber(Server(server.url), give_up_after=600)
        await transcriber.open()
        return "".join([word.text async for word in transcriber.words(chunks())]).split()

    async def pour(*first: dict) -> None:
        """Send an hour of audio as fast as it goes, and listen to nothing."""
        message = json.dumps(append(bytes(640_000)))
        async with websockets.connect(server.url, proxy=None) as socket:
            with contextlib.suppress(websockets.ConnectionClosed):
                for event in first:
                    await socket.send(json.dumps(event))
                for _ in range(180):
                    await socket.send(message)
            await socket.wait_closed()
            codes.append(socket.close_code)

    async def run() -> tuple[list[str], int]:
        listening = asyncio.create_task(microphone())
        before = memory(server.port)
        pouring = [asyncio.create_task(pour()) for _ in range(4)]
        pouring += [asyncio.create_task(pour(UPDATE)) for _ in range(4)]
        pouring += [asyncio.create_task(pour(UPDATE, START)) for _ in range(2)]
        most = before
        while not listening.done():
            most = max(most, memory(server.port))
            await asyncio.sleep(0.2)
        for task in pouring:
            task.cancel()
        await asyncio.gather(*pouring, return_exceptions=True)
        return await listening, most - before

    heard, grown = asyncio.run(run())
    assert heard == [text for text, _, _ in spoken]
    assert codes.count(4413) >= 8
    assert grown < 500 * 2**20  # what vLLM itself needs for two sessions; without bounds 2 GiB more for these ten


def test_sockets_of_an_address(server):
    """64 at once; the next is told to come later."""
    with ExitStack() as sockets:
        with pytest.raises(InvalidStatus) as caught:
            for _ in range(70):
                sockets.enter_context(Client(server.url))
        assert caught.value.response.status_code == 503
        assert caught.value.response.headers["Retry-After"]
        assert b"too_many_sockets" in caught.value.response.body
    with Client(server.url, UPDATE, START, append(bytes(32000))) as client:
        assert client.receive()["type"] == "transcription.delta"


def test_commit_without_a_model(server):
    """It begins nothing, so no more audio may wait than before one: 16 MiB for each of 64 sockets were held."""
    with Client(server.url, START) as client:
        assert client.receive()["code"] == "model_not_validated"
        with contextlib.suppress(websockets.ConnectionClosed):
            client.send(*[append(bytes(640_000))] * 3)
        assert client.ended().rcvd.code == 4413


def test_head(server):
    """Balancers and monitors ask with it."""
    for path in ("health", "v1/models"):
        answer = httpx2.head(f"http://127.0.0.1:{server.port}/{path}")
        assert (answer.status_code, answer.content) == (200, b"")


def test_longest_message(server):
    message = json.dumps(append(b""))
    with Client(server.url, message.ljust(MESSAGE_BYTES)) as client:
        assert client.receive()["code"] == "invalid_audio"
        client.send(message.ljust(MESSAGE_BYTES + 1))
        assert client.ended().rcvd.code == 1009


def test_a_whole_recording_at_once(server):
    """A simple client that sends everything before it listens still gets its text: TCP makes it wait."""
    samples, spoken = talk(60, seed=32)
    pcm = to_pcm16(samples)
    with Client(server.url, UPDATE, START) as client:
        client.send(*[append(pcm[at : at + 32000]) for at in range(0, len(pcm), 32000)], FINAL)
        text = client.finish()[1]["text"].split()
    right = [text for text, _, _ in spoken]
    assert len(text) == len(right)
    assert np.mean([a == b for a, b in zip(text, right, strict=True)]) > 0.95


def test_documented():
    """PROTOCOL.md names the codes and the numbers."""
    codes = set(re.findall(r"^\| (4\d{3}) \|", TEXT, re.MULTILINE))
    assert codes == {"4408", "4413"}
