"""test_file_transcribe.py as a user runs it."""

import asyncio
import contextlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
from proxy import Proxy
from servers import CHECKPOINT, ROOT, free_port, run_script
from speech import talk, write

SAMPLE = CHECKPOINT / "sample.wav"
TEXT = CHECKPOINT / "sample.txt"


def transcribe(*arguments, **options) -> subprocess.CompletedProcess:
    return run_script("test_file_transcribe.py", *arguments, **options)


def fails(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """One line on stderr that names the fix, nothing on stdout, the right exit code."""
    assert result.returncode == code, result
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_sample(server):
    result = transcribe("--audio_path", SAMPLE, "--url", server.url)
    assert result.returncode == 0
    assert result.stdout == TEXT.read_text().strip() + "\n"
    assert "× real time" in result.stderr
    assert "; 1 session, 39 prompt tokens" in result.stderr


@pytest.mark.parametrize("rate", [8000, 44100])
def test_sample_at_other_rates_in_stereo(server, tmp_path, rate):
    samples, _ = soundfile.read(SAMPLE)
    import soxr

    stereo = np.repeat(soxr.resample(samples, 16000, rate)[:, None], 2, axis=1)
    soundfile.write(tmp_path / "s.flac", stereo, rate)
    assert (
        transcribe("--audio_path", tmp_path / "s.flac", "--url", server.url).stdout == TEXT.read_text().strip() + "\n"
    )


def test_realtime_takes_as_long_as_the_audio(server, tmp_path):
    samples, spoken = talk(2, seed=3)
    path = write(tmp_path / "talk.wav", samples)
    started = time.monotonic()
    result = transcribe("--audio_path", path, "--url", server.url, "--realtime")
    assert time.monotonic() - started >= soundfile.info(path).duration
    assert result.stdout.split() == [text for text, _, _ in spoken]


@pytest.mark.parametrize("make", ["missing", "folder", "empty", "text", "no samples"])
def test_bad_files(server, tmp_path, make):
    path = tmp_path / "x.wav"
    match make:
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "text":
            path.write_text("not audio\n" * 100)
        case "no samples":
            soundfile.write(path, np.zeros(0), 16000)
    words = {"missing": "no such file", "folder": "folder", "empty": "empty", "text": "not an audio file"}
    fails(transcribe("--audio_path", path, "--url", server.url), 1, str(path), words.get(make, "no audio samples"))


def test_no_server_there():
    fails(transcribe("--audio_path", SAMPLE, "--url", f"ws://127.0.0.1:{free_port()}"), 1, "./serve.sh")


def test_not_a_realtime_server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        fails(
            transcribe("--audio_path", SAMPLE, "--url", f"ws://127.0.0.1:{web.server_port}"),
            1,
            "not a vLLM realtime server",
        )
        web.shutdown()


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "ws://", "ws://h:99999"])
def test_bad_address(url):
    fails(transcribe("--audio_path", SAMPLE, "--url", url), 1, "not a server address")


def test_unknown_model(server):
    fails(transcribe("--audio_path", SAMPLE, "--url", server.url, "--model", "nobody/nothing"), 1, "tiny")


@pytest.mark.parametrize(
    "arguments",
    [[], ["--audio_path"], ["--audio_path", "x", "--give-up-after", "-1"], ["--audio_path", "x", "--no-such-option"]],
)
def test_usage(arguments):
    result = transcribe(*arguments)
    assert result.returncode == 2
    assert "usage:" in result.stderr
    assert "Traceback" not in result.stderr


def interrupted(url, path, how, times: int) -> subprocess.CompletedProcess:
    """Run at the pace of speech, send a signal `times` times after the first text."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "test_file_transcribe.py", "--audio_path", path, "--url", url, "--realtime"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = os.read(process.stdout.fileno(), 1)
    for _ in range(times):
        process.send_signal(how)
        time.sleep(0.3)
    output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess("", process.returncode, (first + output).decode(), errors.decode())


def test_first_interrupt_waits_for_the_last_words(server, tmp_path):
    samples, spoken = talk(30, seed=3)
    result = interrupted(server.url, write(tmp_path / "talk.wav", samples), signal.SIGINT, 1)
    assert result.returncode == 130
    words = result.stdout.split()
    assert result.stdout.endswith("\n")
    assert words == [text for text, _, _ in spoken][: len(words)]
    assert 3 <= len(words) < len(spoken)


def test_second_interrupt_stops_at_once(server, tmp_path):
    samples, spoken = talk(30, seed=3)
    path = write(tmp_path / "talk.wav", samples)

    async def behind_a_slow_network() -> subprocess.CompletedProcess:
        """The last words are on their way for longer than the second signal is."""
        async with Proxy(server.port, delay=0.1) as proxy:
            return await asyncio.to_thread(interrupted, proxy.url, path, signal.SIGINT, 2)

    result = asyncio.run(behind_a_slow_network())
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    assert result.stdout.split()[:3] == [text for text, _, _ in spoken][:3]


def test_output_to_a_pipe_that_closes(server, tmp_path):
    samples, _ = talk(40, seed=4)
    path = write(tmp_path / "talk.wav", samples)
    process = subprocess.Popen(
        [sys.executable, ROOT / "test_file_transcribe.py", "--audio_path", path, "--url", server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.read(1)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 1
    process.stderr.close()


def test_server_error_in_mid_file(server, tmp_path):
    """The server goes away for good: what was transcribed is on stdout, one line says why it stopped."""
    import asyncio

    from proxy import Proxy

    samples, spoken = talk(40, seed=4)
    path = write(tmp_path / "talk.wav", samples)

    async def scenario() -> subprocess.CompletedProcess:
        async with Proxy(server.port, [(250, "reset")]) as proxy:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, ROOT / "test_file_transcribe.py", "--audio_path", path),
                *("--url", proxy.url, "--give-up-after", "2", "--parallel", "1"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            first = await process.stdout.read(1)
            proxy.refusing = True
            output, errors = await process.communicate()
            return subprocess.CompletedProcess("", process.returncode, (first + output).decode(), errors.decode())

    result = asyncio.run(scenario())
    assert result.returncode == 1
    assert "error: gave up after 2 s" in result.stderr
    assert "Traceback" not in result.stderr
    words = result.stdout.split()
    assert 10 < len(words) < len(spoken)
    assert sum(a == b[0] for a, b in zip(words, spoken, strict=False)) >= len(words) - 1


def test_progress_bar_on_a_terminal(server):
    """On a pseudo-terminal: a bar with the speed while it runs, the text for good at the end."""
    import pty

    main, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "test_file_transcribe.py", "--audio_path", SAMPLE, "--url", server.url],
        stdout=other,
        stderr=other,
        stdin=other,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
    )
    os.close(other)
    seen = b""
    with contextlib.suppress(OSError):
        while data := os.read(main, 4096):
            seen += data
    os.close(main)
    assert process.wait() == 0
    assert "━".encode() in seen
    assert "× real time".encode() in seen
    assert TEXT.read_text().split()[-1].encode() in seen
