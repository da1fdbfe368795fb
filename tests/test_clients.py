"""The clients in Python, JavaScript and Dart with a scripted server: the same faults, the same words."""

import asyncio
import contextlib
import itertools
import json
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from clients import NOT_PYTHON, dart, drive, needs_dart
from conftest import CHECKPOINT, ROOT, free_port, run_script
from proxy import Proxy
from scripted import DIGITS, Ear, Scripted, ScriptedServer, hearing, scripted, tones

from voxtral_client.audio import to_pcm16

SAMPLE = CHECKPOINT / "sample.wav"
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
async def babel() -> AsyncIterator[dict[str, ScriptedServer]]:
    """A server for each language. Two sessions begin without a space, two with one, and so on; the first one breaks."""

    def sessions(texts: list[str]) -> Callable[[], Scripted]:
        bare = itertools.cycle([True, True, False, False])
        return lambda: Scripted(speak=Ear(texts, next(bare)))

    async with contextlib.AsyncExitStack() as stack:
        yield {
            language: await stack.enter_async_context(
                ScriptedServer(sessions(words_of(language)), entry=BRIEF, cuts=[22])
            )
            for language in SCRIPTS
        }


def assert_spaces(servers: dict[str, ScriptedServer], texts: list[str]) -> None:
    for (language, server), got in zip(servers.items(), texts, strict=True):
        assert len(server.sessions) >= 5, language  # one that broke, and each way of beginning after each
        assert got.strip() == "".join(words_of(language)).strip(), language


@pytest.fixture
def audio(tmp_path):
    """Writes samples as bare PCM16 for `drive`."""

    def write(samples: np.ndarray) -> Path:
        path = tmp_path / f"{len(samples)}.pcm"
        path.write_bytes(to_pcm16(samples))
        return path

    return write


@pytest.mark.parametrize("client", ["python", *NOT_PYTHON])
def test_every_script_keeps_its_spaces(audio, client):
    """At a resume and at rollovers, whether or not a session begins with a space."""

    async def run() -> None:
        async with babel() as servers:
            jobs = [{"url": server.url, "path": audio(tones(8, gap=1.2))} for server in servers.values()]
            results = await asyncio.to_thread(drive, client, *jobs)
            assert_spaces(servers, [result["text"] for result in results])

    asyncio.run(asyncio.wait_for(run(), 250))


ENTRIES = [  # what /v1/models says, and how many sessions 90 s of talk take then
    ({}, 2),  # stock vLLM
    ({"voxtral_speed": True}, 1),
    ({"voxtral_speed": True, "max_model_len": 1024}, 3),
]


@pytest.mark.parametrize("client", ["python", *NOT_PYTHON])
def test_rollover_depends_on_the_server(audio, client):
    """A session of a stock server gets slower as it grows; one that does not is left in peace, as /v1/models says."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(scripted(hearing(), entry=entry)) for entry, _ in ENTRIES]
        results = drive(client, *[{"url": server.url, "path": audio(tones(90))} for server in servers])
        assert [result["text"] for result in results] == ["".join(DIGITS[:90])] * 3
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
    assert (result["end"], result["text"]) == ("done", "".join(DIGITS[:8]))
    assert "no answer for 3 s; trying again" in result["told"]
    assert result["sessions"] >= 2


# --- examples/client.dart from the command line ---


def run_dart(*arguments: object) -> subprocess.CompletedProcess:
    command = [*dart("examples/client.dart"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@needs_dart
@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], 2), (["/no/such.wav"], 1), ([ROOT / "PROTOCOL.md"], 1), ([SAMPLE, "http://x"], 1), ([SAMPLE, "ws://["], 1)],
)
def test_dart_mistakes(arguments, status):
    result = run_dart(*arguments)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (status, "", 1), result.stderr


@pytest.mark.slow
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
