"""Files over HTTP, asked of the real server by OpenAI's own clients for Python and JavaScript, and by curl."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock

import av
import httpx2
import numpy as np
import openai
import psutil
import pytest
import soundfile
import srt
import webvtt
from servers import ROOT, run_script
from speech import RATE, sparse_silence, talk, write
from starlette.applications import Starlette
from starlette.routing import Route
from test_protocol import NODE, START, UPDATE, Client, append
from voxtral_web import decode, upload

from voxtral_client.media import AudioError, AudioFile
from voxtral_client.timeline import Word


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


def test_times_without_verbose_json(client, base, recording):
    """Subtitle Edit asks for them so, and reads of a stream only what has a line `event:`."""
    verbose = post(client, recording, response_format="verbose_json")
    words, segments = [w.model_dump() for w in verbose.words], [s.model_dump() for s in verbose.segments]
    answer = post(client, recording, timestamp_granularities=["segment", "word"])
    assert (answer.model_extra["words"], answer.model_extra["segments"]) == (words, segments)
    form = {"stream": "true", "timestamp_granularities[]": "segment"}
    with recording.open("rb") as file:
        text = httpx2.post(f"{base}/audio/transcriptions", data=form, files={"file": file}, timeout=60).text
    kind, data = re.findall(r"^event: (.*)\ndata: (.*)$", text, re.MULTILINE)[-1]
    assert (kind, json.loads(data)["segments"]) == ("transcript.text.done", segments)


def test_stream(client, recording, by_file_client):
    events = list(post(client, recording, stream=True))
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * len(by_file_client["words"])
    assert events[-1].type == "transcript.text.done"
    text = text_of(by_file_client["words"])
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == text
    assert events[-1].model_extra["complete"]


def test_telephone_audio_is_known_by_the_ending_of_its_name(client, folder, recording, server):
    path = folder / "call.ul"
    command = ["ffmpeg", "-v", "error", "-i", recording, "-ar", "8000", "-f", "mulaw", path]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    words = run_script("test_file_transcribe.py", path, "--url", server.url).stdout.split()
    assert len(words) > 6
    assert post(client, path).text.split() == words


def test_long_file(client, folder):
    """In several pieces, through several sessions at once; the stream begins long before the end."""
    samples, spoken = talk(100, seed=52)
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
    samples, _ = talk(24, seed=53)
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

    settings = SimpleNamespace(max_num_seqs=8, data_parallel_size=1, api_server_count=1)
    uploads = upload.Uploads(settings, None)

    async def read() -> None:
        async with AsyncExitStack() as stack:
            async for _ in uploads._bounded(endless(), stack):
                pass

    monkeypatch.setattr(upload, "MAX_MEGABYTES", 3)
    with pytest.raises(upload.Failure, match="MAX_UPLOAD_MB") as caught:
        asyncio.run(read())
    assert caught.value.answer.status_code == 413


@contextmanager
def application():
    """An app with nothing but the route, over an engine that is not there."""
    settings = SimpleNamespace(max_num_seqs=8, data_parallel_size=1, api_server_count=1)
    app = Starlette()
    app.state.openai_serving_realtime = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024))
    app.state.uploads = upload.Uploads(settings, app.state)
    app.router.routes.append(Route("/", app.state.uploads))
    yield app
    asyncio.run(app.state.uploads._spare.end())


def asking(app: Starlette) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://x", timeout=60)


def test_no_session_becomes_free(monkeypatch):
    """503 with Retry-After, after some waiting; a session that is given back goes to who waits."""
    lent, ends = [], []

    class BusyPool:
        """In place of the pool: notes how many sessions it may take, and is at work until it is told to end."""

        def __init__(self, server: object, size: int, stop: asyncio.Event):
            lent.append(size)
            self.end = asyncio.Event()
            ends.append(self.end)

        async def run(self, pieces: object):
            await self.end.wait()
            yield SimpleNamespace(offset=0, transcriber=SimpleNamespace(received=1.0)), None

    monkeypatch.setattr(upload, "Pool", BusyPool)
    monkeypatch.setattr(decode, "COMMAND", ["cat"])
    monkeypatch.setattr(upload, "WAIT_SECONDS", 0.3)

    async def run(app: Starlette) -> None:
        async with asking(app) as client:
            ask = lambda: client.post("/", files={"file": ("a.wav", b"x")}, data={"response_format": "text"})  # noqa: E731
            asked = []
            for number in (1, 2, 3):
                asked.append(asyncio.create_task(ask()))
                while len(lent) < number:
                    await asyncio.sleep(0.05)
            assert lent == [2, 1, 1]  # of half the slots, each takes half of what is left
            answer = await ask()
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
            monkeypatch.setattr(upload, "WAIT_SECONDS", 60)
            asked.append(asyncio.create_task(ask()))
            await asyncio.sleep(0.1)
            ends[0].set()
            while len(lent) < 4:
                await asyncio.sleep(0.05)
            for end in ends:
                end.set()
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 4

    with application() as app:
        asyncio.run(asyncio.wait_for(run(app), 60))


class Silent(upload.Engine):
    """An engine that does not answer any more."""

    @asynccontextmanager
    async def session(self, model: str):
        yield self

    async def receive(self) -> None:
        await asyncio.Future()

    send = finish = AsyncMock()


@pytest.mark.parametrize("decoder", [decode.COMMAND, ["sleep", "600"]], ids=["engine", "decoder"])
def test_server_stops(recording, monkeypatch, decoder):
    """It ends its responses, for which it waits; engine or decoder do not answer any more."""

    async def run(app: Starlette) -> None:
        app.state.server = SimpleNamespace(should_exit=False)
        async with asking(app) as client:
            answer = asyncio.create_task(client.post("/", files={"file": recording.read_bytes()}))
            assert not (await asyncio.wait([answer], timeout=2))[0]
            app.state.server.should_exit = True
            answer = await answer
            assert (answer.status_code, "stopping" in answer.json()["error"]["message"]) == (503, True)

    monkeypatch.setattr(upload, "Engine", Silent)
    monkeypatch.setattr(decode, "COMMAND", decoder)
    with application() as app:
        asyncio.run(asyncio.wait_for(run(app), 60))


class OneWord:
    """In place of the pool: yields a word, and no more."""

    def __init__(self, *_: object):
        pass

    async def run(self, pieces: object):
        yield None, Word(" seven", 0.0, 1.0, 1)
        await asyncio.Future()


class Wire:
    """A request as uvicorn gives it to an application: a file, then silence."""

    def __init__(self, stream: bool):
        form = {"stream": str(stream)}
        request = httpx2.Request("POST", "http://x/", files={"file": b"x"}, data=form)
        headers = [(name.lower(), value) for name, value in request.headers.raw]
        self.scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
        self.scope["asgi"] = {"spec_version": "2.3"}
        self.incoming: asyncio.Queue[dict] = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": request.read(), "more_body": False})
        self.sent: list[dict] = []

    async def send(self, message: dict) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("stream", [False, True])
def test_client_hangs_up_of_a_busy_server(monkeypatch, stream):
    """The decoder ends also where no thread is free: one waited for data for ever on a machine that had much to do."""
    monkeypatch.setattr(upload, "Pool", OneWord)
    monkeypatch.setattr(decode, "COMMAND", ["sleep", "600"])

    async def run(app: Starlette) -> None:
        wire = Wire(stream)
        app.state.uploads.warm()
        working, loop, busy = app.state.uploads._spare.process, asyncio.get_running_loop(), threading.Event()
        answering = asyncio.create_task(app.state.uploads(wire.scope, wire.incoming.get, wire.send))
        while app.state.uploads._spare or (stream and len(wire.sent) < 2):
            await asyncio.sleep(0.01)
        assert not answering.done()
        loop.set_default_executor(ThreadPoolExecutor(1))
        loop.run_in_executor(None, busy.wait)
        wire.incoming.put_nowait({"type": "http.disconnect"})
        await asyncio.sleep(0.5)
        busy.set()
        await answering
        assert working.poll() is not None
        assert (app.state.uploads._free, app.state.uploads._stored) == (4, {})

    with application() as app:
        asyncio.run(asyncio.wait_for(run(app), 60))


def test_client_reads_nothing(monkeypatch):
    """Of its stream: it is given up, and what it had is free."""
    monkeypatch.setattr(upload, "Pool", OneWord)
    monkeypatch.setattr(upload, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(decode, "COMMAND", ["sleep", "600"])

    async def run(app: Starlette) -> None:
        wire = Wire(stream=True)
        await app.state.uploads(wire.scope, wire.incoming.get, lambda message: asyncio.Future())
        assert (app.state.uploads._free, app.state.uploads._stored) == (4, {})

    with application() as app:
        asyncio.run(asyncio.wait_for(run(app), 60))


def segment(text: str, start: float, end: float, seconds: float) -> dict:
    transcript = upload.WholeFile(0.0, seconds, [Word(text, start, end, 0)])
    return next(upload.segments(transcript))


def test_segments_hold_numbers_and_end_with_the_file():
    """Typed clients hold no null; a player cannot show a cue after the end."""
    found = segment(" seven", 1.0, 1.2, seconds=1.5)
    assert (found["start"], found["end"], found["text"]) == (1.0, 1.5, "seven")
    assert all(isinstance(found[name], float) for name in ("avg_logprob", "compression_ratio", "no_speech_prob"))
    assert segment(" no" * 40, 1.0, 1.2, seconds=9)["compression_ratio"] > 2.4  # what Whisper calls a loop


# In place of the decoder: gives back how many bytes it got, and how many hours it may decode.
ECHO = "import json, os, sys; path, _, hours = json.loads(input()); sys.exit(f'{os.path.getsize(path)} {hours}')"


def test_bounds_of_uploads(monkeypatch):
    """Of the hours of audio, of all files' bytes together, and of the fields, which are held in memory."""
    monkeypatch.setattr(decode, "COMMAND", [sys.executable, "-c", ECHO])
    monkeypatch.setattr(upload, "MAX_MEGABYTES", 1)
    arrived, enough = [], asyncio.Event()

    async def slowly():
        yield b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + bytes(1_900_000)
        arrived.append(True)
        await enough.wait()
        yield b"\r\n--x--\r\n"

    async def run(app: Starlette) -> None:
        async with asking(app) as client:
            form = {"headers": {"Content-Type": "multipart/form-data; boundary=x"}}
            slow = [asyncio.create_task(client.post("/", content=slowly(), **form)) for _ in range(4)]
            while len(arrived) < 4:
                await asyncio.sleep(0.01)
            answer = await client.post("/", files={"file": bytes(1_000_000)})
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
            enough.set()
            for answer in await asyncio.gather(*slow):
                assert answer.json()["error"]["message"] == "1900000 12.0"  # without a name it is a file all the same
            assert not app.state.uploads._stored
            answer = await client.post("/", files={"file": b"x"}, data={"prompt": "x" * 40_000})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_form")

    with application() as app:
        asyncio.run(asyncio.wait_for(run(app), 60))


def test_hours_of_nothing(tmp_path):
    """A file of a few hundred bytes whose times leave a gap of 100 hours; and one that does not say how long it is."""
    with av.open(tmp_path / "gap.mkv", "w") as container:
        stream = container.add_stream("libopus", rate=48000, layout="mono")
        for at in (0, 48000 * 3600 * 100):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), format="s16", layout="mono")
            frame.rate, frame.pts = 48000, at
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert (tmp_path / "gap.mkv").stat().st_size < 2000
    decoding = decode.Decoding()
    decoding.begin(str(tmp_path / "gap.mkv"), "film.mkv", 12)
    with pytest.raises(AudioError, match=r"^film.mkv: is longer than 12 hours$"):
        list(decoding.blocks())
    asyncio.run(decoding.end())
    sparse_silence(tmp_path / "long.wav", 90)
    audio = AudioFile(tmp_path / "long.wav")
    audio.hours = 1 / 60
    with pytest.raises(AudioError, match="is longer than"):
        for _ in audio.blocks():
            pass


def decoder(server) -> psutil.Process:
    """The process that waits for the server's next file; perhaps it does not, because it has one."""
    while True:
        for process in psutil.process_iter(["cmdline", "environ"]):
            ours = (process.info["environ"] or {}).get("PORT") == str(server.port)
            if ours and "voxtral_web.decode" in (process.info["cmdline"] or []):
                return process
        time.sleep(0.1)


@pytest.mark.parametrize("stream", [False, True])
def test_client_hangs_up(client, server, folder, stream):
    """Its sessions end, and so does the process that was at work for it."""
    path = write(folder / "hour.wav", talk(600, seed=54)[0])
    working = decoder(server)
    options = {"base_url": client.base_url, "api_key": "none", "max_retries": 0, "timeout": 8}
    with suppress(openai.APITimeoutError), openai.OpenAI(**options) as impatient:
        next(iter(post(impatient, path, stream=stream)))
    working.wait(60)
    with ExitStack() as stack:
        lives = [stack.enter_context(Client(server.url, UPDATE, START, append(bytes(32000)))) for _ in range(4)]
        assert [live.receive()["type"] for live in lives] == ["transcription.delta"] * 4


def test_decoder_crashes(client, server, folder, recording, by_file_client):
    """While it waits: nobody notices. At work: what was understood comes, and that it is not all."""
    (waiting := decoder(server)).kill()
    while waiting.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert post(client, recording).text == text_of(by_file_client["words"])
    path, working = write(folder / "hour.wav", talk(600, seed=54)[0]), decoder(server)
    events = post(client, path, stream=True)
    assert next(events).delta
    working.send_signal(signal.SIGSEGV)
    done = list(events)[-1]
    assert len(done.text.split()) > 1
    assert (done.model_extra["complete"], "hour.wav: " in done.model_extra["warning"]) == (False, True)
    assert post(client, recording).text == text_of(by_file_client["words"])


def test_eight_at_once(client, server, recording, by_file_client):
    """Four slots: all eight come through, and live captions find a slot in the midst of it."""
    waiting = decoder(server)
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(post, client, recording) for _ in range(8)]
        waiting.wait(60)  # the first file is done
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


ASK_TYPED = """
import fs from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { transcribe } from "ai";
const [path, baseURL] = process.argv.slice(2);
const model = createOpenAI({ baseURL, apiKey: "none" }).transcription("tiny");
const found = [];
for (const more of [{}, { timestampGranularities: ["segment"] }, { timestampGranularities: ["word"] }]) {
  const providerOptions = { openai: { responseFormat: "verbose_json", ...more } };
  found.push(await transcribe({ model, audio: fs.readFileSync(path), providerOptions, maxRetries: 0 }));
}
console.log(JSON.stringify(found));
"""


def test_typed_javascript(base, tmp_path, recording, by_file_client):
    """Vercel's AI SDK checks the type of each field."""
    (tmp_path / "node_modules").symlink_to(Path(sys.prefix) / "ai" / "node_modules")
    (tmp_path / "ask.mjs").write_text(ASK_TYPED)
    result = subprocess.run([NODE, tmp_path / "ask.mjs", recording, base], capture_output=True, timeout=600)
    assert result.returncode == 0, result.stderr.decode()
    for answer in json.loads(result.stdout):
        assert answer["text"] == text_of(by_file_client["words"])
        assert " ".join(segment["text"] for segment in answer["segments"]) == answer["text"]
        assert answer["segments"][-1]["endSecond"] <= by_file_client["seconds"]


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
