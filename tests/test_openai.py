"""Files over HTTP, asked of the real server by OpenAI's own clients for Python and JavaScript, and by curl."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import openai
import psutil
import pytest
import soundfile
import srt
import webvtt
from conftest import ROOT, run_script
from speech import RATE, talk, write
from starlette.applications import Starlette
from starlette.routing import Route
from test_protocol import NODE, START, UPDATE, Client, append
from voxtral_web import upload


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("openai")


@pytest.fixture(scope="module")
def recording(folder) -> Path:
    return write(folder / "talk.wav", talk(12, seed=51)[0])


@pytest.fixture(scope="module")
def by_file_client(server, folder, recording) -> dict:
    """What test_file_transcribe.py makes of the recording; its subtitles lie in the folder."""
    formats = ["-f", "json", "-f", "srt", "-f", "vtt"]
    result = run_script("test_file_transcribe.py", recording, "-o", f"{folder}/", *formats, "--url", server.url)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "talk.json").read_text())


@pytest.fixture(scope="module")
def base(server) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


@pytest.fixture(scope="module")
def client(base):
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
        yield client


def post(client: openai.OpenAI, path: Path, **form: object) -> object:
    with path.open("rb") as file:
        return client.audio.transcriptions.create(file=file, **{"model": "tiny"} | form)


# --- formats ---


def text_of(words: list[dict], key: str = "text") -> str:
    return " ".join(word[key] for word in words)


def test_json(client, recording, by_file_client):
    answer = post(client, recording, language="en", prompt="kilo", temperature=0)
    assert answer.text == text_of(by_file_client["words"])
    assert len(answer.text.split()) > 6
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == pytest.approx(soundfile.info(recording).duration, abs=0.01)
    assert answer.model_extra == {"complete": True}


def test_text_and_subtitles(client, folder, recording, by_file_client):
    """The file client's own, to the letter; strict parsers read them."""
    assert post(client, recording, response_format="text") == text_of(by_file_client["words"]) + "\n"
    subtitles = post(client, recording, response_format="srt")
    assert subtitles == (folder / "talk.srt").read_text()
    assert len(list(srt.parse(subtitles))) > 2
    subtitles = post(client, recording, response_format="vtt")
    assert subtitles == (folder / "talk.vtt").read_text()
    assert len(webvtt.from_string(subtitles)) > 2


def test_word_times(client, recording, by_file_client):
    """Equal to the file client's; segments hold the same words."""
    answer = post(client, recording, response_format="verbose_json")
    assert [(w.word, w.start, w.end) for w in answer.words] == [
        (w["text"], w["start"], w["end"]) for w in by_file_client["words"]
    ]
    assert (answer.duration, answer.language) == (by_file_client["seconds"], "unknown")
    assert " ".join(segment.text for segment in answer.segments) == answer.text
    assert [segment.id for segment in answer.segments] == list(range(len(answer.segments)))
    assert all(a.end <= b.start for a, b in zip(answer.segments, answer.segments[1:], strict=False))
    only = post(client, recording, response_format="verbose_json", timestamp_granularities=["word"], language="en")
    assert (only.segments, only.words, only.language) == (None, answer.words, "en")
    only = post(client, recording, response_format="verbose_json", timestamp_granularities=["segment"])
    assert (only.segments, only.words) == (answer.segments, None)


def test_stream(client, recording, by_file_client):
    events = list(post(client, recording, stream=True))
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * len(by_file_client["words"])
    assert events[-1].type == "transcript.text.done"
    text = text_of(by_file_client["words"])
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == text
    assert events[-1].model_extra["complete"]


def test_three_minutes(client, folder):
    """In several pieces, through several sessions at once; the stream begins long before the end."""
    samples, spoken = talk(180, seed=52)
    path, arrived, words = write(folder / "long.wav", samples), [], []
    for event in post(client, path, stream=True):
        arrived.append(time.monotonic())
        words += [event.delta] if event.type == "transcript.text.delta" else []
    right = [text for text, _, _ in spoken]
    heard = "".join(words).split()
    assert len(heard) == len(right)
    assert np.mean([a == b for a, b in zip(heard, right, strict=True)]) > 0.95
    assert arrived[-1] - arrived[0] > (arrived[-1] - arrived[len(arrived) // 2]) > 0


def test_models(client):
    (model,) = client.models.list()
    assert (model.id, model.model_extra["max_model_len"], model.model_extra["max_upload_mb"]) == ("tiny", 1024, 512)


# --- what goes wrong ---


def test_no_audio(client, folder):
    """400 in the words of the file client, with the name that the client gave."""
    for name, content in (("notes.txt", b"no audio at all\n" * 100), ("empty.wav", b"")):
        (folder / name).write_bytes(content)
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=name) as caught:
                post(client, folder / name, stream=stream)
            assert (caught.value.code, caught.value.param) == ("invalid_audio", "file")
            assert "/proc" not in str(caught.value)


def test_damaged(client, folder):
    """What was understood comes, and that it is not all."""
    samples, _ = talk(40, seed=53)
    path = folder / "damaged.flac"
    soundfile.write(path, samples, RATE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) * 3 // 4] = bytes(len(content) * 3 // 4 - len(content) // 2)
    path.write_bytes(content)
    answer = post(client, path, response_format="verbose_json")
    assert not answer.model_extra["complete"]
    assert "damaged.flac" in answer.model_extra["warning"]
    assert len(answer.words) > 5
    raw = client.audio.transcriptions.with_raw_response.create(file=path, model="tiny", response_format="srt")
    assert "damaged.flac" in raw.headers["x-transcript-warning"]
    assert not list(post(client, path, stream=True))[-1].model_extra["complete"]


@pytest.mark.parametrize(
    ("form", "error", "param"),
    [
        ({"model": "whisper-1"}, openai.NotFoundError, "model"),
        ({"response_format": "diarized_json"}, openai.BadRequestError, "response_format"),
        ({"timestamp_granularities": ["letter"]}, openai.BadRequestError, "timestamp_granularities[]"),
        ({"response_format": "srt", "stream": True}, openai.BadRequestError, "stream"),
    ],
)
def test_wrong_form(client, recording, form, error, param):
    with pytest.raises(error) as caught:
        post(client, recording, **form)
    assert caught.value.param == param


def test_no_form(base):
    url = f"{base}/audio/transcriptions"
    for body in ({"json": {"file": "x"}}, {"data": {"model": "tiny"}}, {"files": {"file": (None, "text")}}):
        answer = httpx2.post(url, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
    broken = httpx2.post(url, content=b"no boundary", headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_form")


def test_what_the_model_cannot_do(client, base):
    answer = httpx2.post(f"{base}/audio/translations", files={"file": b"x"})
    assert (answer.status_code, "/v1/audio/transcriptions" in answer.json()["error"]["message"]) == (501, True)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    assert caught.value.status_code == 501


def test_too_large(base, monkeypatch):
    """By its header before it comes, and while it comes if that says nothing."""
    address = base.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((address[0], int(address[1]))) as plain:
        head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Length: 600000000\r\n"
        plain.sendall((head + "Content-Type: multipart/form-data; boundary=x\r\n\r\n").encode())
        assert b"HTTP/1.1 413" in plain.recv(100)

    async def endless():
        while True:
            yield bytes(2**20)

    async def read() -> None:
        async for _ in upload.bounded(endless()):
            pass

    monkeypatch.setattr(upload, "MAX_MEGABYTES", 3)
    with pytest.raises(upload.Failure, match="MAX_UPLOAD_MB") as caught:
        asyncio.run(read())
    assert caught.value.answer.status_code == 413


# In place of the file client: notes how many sessions it may take, and is at work until it is told to end.
BUSY = """
import os, sys, time
folder = os.path.dirname(__file__)
with open(f"{folder}/lent", "a") as file:
    file.write(sys.argv[sys.argv.index("--parallel") + 1])
turn = os.path.getsize(f"{folder}/lent")
while not os.path.exists(f"{folder}/end{turn}"):
    time.sleep(0.05)
os.write(1, b'{"complete": true, "seconds": 1.0}\\n')
os.close(1), os.close(2)
time.sleep(60)  # it is killed
"""


def test_no_session_becomes_free(tmp_path, monkeypatch):
    """503 with Retry-After, after some waiting; a session that is given back goes to who waits."""
    (tmp_path / "busy.py").write_text(BUSY)
    (tmp_path / "lent").touch()
    monkeypatch.setattr(upload, "CLIENT", tmp_path / "busy.py")
    monkeypatch.setattr(upload, "WAIT_SECONDS", 0.3)
    settings = {"data_parallel_size": 1, "api_server_count": 1, "ssl_certfile": None, "host": "127.0.0.1", "port": 1}
    uploads = upload.Uploads(SimpleNamespace(max_num_seqs=8, **settings), None)
    app = Starlette(routes=[Route("/", uploads.__call__, methods=["POST"])])

    async def lent(clients: int) -> str:
        """How many sessions each client got, once there were so many clients."""
        while len(text := (tmp_path / "lent").read_text()) < clients:
            await asyncio.sleep(0.05)
        return text

    async def run() -> None:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://x", timeout=60) as client:
            ask = lambda: client.post("/", files={"file": ("a.wav", b"x")}, data={"response_format": "text"})  # noqa: E731
            asked = []
            for number in (1, 2, 3):
                asked.append(asyncio.create_task(ask()))
                await lent(number)
            assert await lent(3) == "211"  # of half the slots, each takes half of what is left
            answer = await ask()
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
            monkeypatch.setattr(upload, "WAIT_SECONDS", 60)
            asked.append(asyncio.create_task(ask()))
            await asyncio.sleep(0.1)
            (tmp_path / "end1").touch()
            assert await lent(4) == "2111"
            for number in (2, 3, 4):
                (tmp_path / f"end{number}").touch()
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 4

    asyncio.run(asyncio.wait_for(run(), 60))


def sessions(server) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as reply:
        return round(float(re.search(r"^vllm:websocket_connections_active\S* (\S+)$", reply.read().decode(), re.M)[1]))


def clients() -> list[psutil.Process]:
    """The file clients that uploads have started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any("test_file_transcribe.py" in part for part in command) and any("/proc/" in part for part in command):
            found.append(process)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_client_hangs_up(client, server, folder, stream):
    """Its sessions end, and so does the process that was at work for it."""
    path = write(folder / "hour.wav", talk(600, seed=54)[0])
    before = sessions(server)

    options = {"base_url": client.base_url, "api_key": "none", "max_retries": 0, "timeout": 4}
    with suppress(openai.APITimeoutError), openai.OpenAI(**options) as impatient:
        next(iter(post(impatient, path, stream=stream)))
    deadline = time.monotonic() + 60
    while (clients() or sessions(server) > before) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (clients(), sessions(server)) == ([], before)


def test_eight_at_once(client, server, recording, by_file_client):
    """Four slots: all eight come through, and live captions find a slot in the midst of it."""
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(post, client, recording) for _ in range(8)]
        while not clients() or sessions(server) == 0:
            time.sleep(0.05)
        with Client(server.url, UPDATE, START, append(bytes(32000))) as live:
            assert live.receive()["type"] == "transcription.delta"
        texts = {future.result().text for future in asking}
    assert texts == {text_of(by_file_client["words"])}


# --- JavaScript, and the lines of docs/clients.md ---


@pytest.fixture(scope="module")
def javascript(folder) -> Path:
    """A folder with OpenAI's package for JavaScript."""
    modules = Path(sys.prefix) / "openai" / "node_modules"
    assert modules.is_dir(), "run scripts/install-test-tools"
    (folder / "node_modules").symlink_to(modules)
    return folder


ASK = """
import fs from "node:fs";
import OpenAI from "openai";
const [path, baseURL] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const ask = (form) =>
  client.audio.transcriptions.create({ file: fs.createReadStream(path), model: "tiny", ...form });
const found = { errors: [], deltas: [] };
for (const response_format of ["json", "text", "srt", "vtt", "verbose_json"])
  found[response_format] = await ask({ response_format });
for await (const event of await ask({ stream: true }))
  if (event.type === "transcript.text.delta") found.deltas.push(event.delta);
  else found.done = event.text;
for (const form of [{ model: "whisper-1" }, { response_format: "nonsense" }])
  await ask(form).catch((error) => found.errors.push([error.status, error.constructor.name, error.param]));
console.log(JSON.stringify(found));
"""


def test_javascript(base, javascript, recording, by_file_client):
    (javascript / "ask.mjs").write_text(ASK)
    result = subprocess.run([NODE, javascript / "ask.mjs", recording, base], capture_output=True, timeout=600)
    assert result.returncode == 0, result.stderr.decode()
    found = json.loads(result.stdout)
    text = text_of(by_file_client["words"])
    assert found["json"]["text"] == found["done"] == "".join(found["deltas"]) == text
    assert found["text"].strip() == text
    assert found["srt"] == (javascript / "talk.srt").read_text()
    assert found["vtt"] == (javascript / "talk.vtt").read_text()
    assert text_of(found["verbose_json"]["words"], "word") == text
    assert found["errors"] == [[404, "NotFoundError", "model"], [400, "BadRequestError", "response_format"]]


DOCUMENT = (ROOT / "docs" / "clients.md").read_text()
DOCUMENT = DOCUMENT.split("\n## From any app that knows OpenAI's API\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def by_document(server, folder):
    """A folder with talk.mp3, and a way to run there what docs/clients.md says, but for the port."""
    soundfile.write(folder / "talk.mp3", soundfile.read(folder / "talk.wav")[0], RATE)

    def run(*command: object) -> str:
        command = [str(part).replace("localhost:8000", f"127.0.0.1:{server.port}") for part in command]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_document_curl(by_document, folder, recording, by_file_client):
    lines = re.findall(r"^    (curl .*)$", DOCUMENT, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        output = by_document("bash", "-c", line)
        if "talk.srt" in line:
            output = (folder / "talk.srt").read_text()
        assert by_file_client["words"][0]["text"] in output


def test_document_packages(by_document, javascript, recording, by_file_client):
    python, script = re.findall(r"```(?:python|javascript)\n(.*?)```", DOCUMENT, re.DOTALL)
    text = text_of(by_file_client["words"])
    assert by_document(sys.executable, "-c", python).strip() == text
    assert by_document(NODE, "--input-type=module", "-e", script).strip() == text
