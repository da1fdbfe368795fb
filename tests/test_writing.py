"""What comes out when something goes wrong: nothing is erased, nothing unfinished is called complete, nothing hangs.

The server is a `Speaker`, which has no model: the faults are the client's, the disk's and the user's.
"""

import asyncio
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import CHECKPOINT, ROOT, run_script
from speaker import speaking
from speech import sparse_silence, talk, write

from voxtral_client.media import AudioFile
from voxtral_client.pool import HELD, Pool, cut, limits
from voxtral_client.protocol import RATE
from voxtral_client.recording import Recording
from voxtral_client.session import Server

SAMPLE = CHECKPOINT / "sample.wav"
SCRIPT = ROOT / "test_file_transcribe.py"


@pytest.fixture(scope="module")
def speaker():
    with speaking() as speaker:
        yield speaker


def transcribe(speaker, *arguments, **options) -> subprocess.CompletedProcess:
    return run_script("test_file_transcribe.py", *arguments, "--url", speaker.url, **options)


def started(speaker, *arguments, **options) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments), "--url", speaker.url], **options)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=60)
    return process.returncode, output.decode(), errors.decode()


def silence(path: Path, seconds: float) -> Path:
    soundfile.write(path, np.random.default_rng(0).normal(0, 1e-3, round(seconds * RATE)), RATE)
    return path


@pytest.mark.parametrize("form", ["txt", "srt", "vtt", "json", "jsonl"])
def test_standard_output_is_only_appended_to(speaker, tmp_path, form):
    """Into a file that has a head already, with >>, and through a pipe: the same bytes."""
    piped = transcribe(speaker, SAMPLE, SAMPLE, "-f", form, "-o", "-").stdout
    (tmp_path / "out").write_text("head\n")
    with (tmp_path / "out").open("a") as file:
        transcribe(speaker, SAMPLE, SAMPLE, "-f", form, "-o", "-", capture_output=False, stdout=file, stderr=file)
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[0] == "head"
    changing = ("took", "speed")
    for line in piped.splitlines():
        assert line in lines or any(word in line for word in changing)
    with (tmp_path / "out").open("r+") as file:  # the shell's `> out` after a header: position, not O_APPEND
        file.seek(5)
        transcribe(speaker, SAMPLE, "-f", form, "-o", "-", capture_output=False, stdout=file, stderr=subprocess.DEVNULL)
    assert (tmp_path / "out").read_text().startswith("head\n")


@pytest.mark.parametrize("parallel", [1, 4])
def test_interrupted_is_not_complete(tmp_path, parallel):
    with speaking() as slow:
        path, out = sparse_silence(tmp_path / "a.wav", 3000), tmp_path / "a.json"
        process = started(slow, path, "-o", out, "--parallel", parallel)
        while not (out.exists() and len(out.read_bytes()) > 200):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        code, _, errors = ended(process)
        assert code == 130, errors
        found = json.loads(out.read_text())
        assert found["complete"] is False
        assert 0 < found["seconds"] < 3000
        assert (tmp_path / "a.json.unfinished").exists()
        silence(path, 3)
        result = transcribe(slow, path, "-o", out, "--skip-existing")
        assert "0 already transcribed" in result.stderr
        assert json.loads(out.read_text())["complete"] is True
        assert not (tmp_path / "a.json.unfinished").exists()


@pytest.mark.parametrize("when", ["connecting", "waiting", "running"])
def test_sigterm_ends_within_a_second(tmp_path, when):
    with speaking(silent=when == "waiting") as speaker:
        path = sparse_silence(tmp_path / "a.wav", 3000)
        process = started(speaker, path, "-f", "jsonl", "-o", "-", "--quiet", "--parallel", 2)
        if when == "running":
            process.stdout.readline()
        else:
            time.sleep(0.1 if when == "connecting" else 2)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code, output, errors = ended(process)
        assert time.monotonic() - begun < 10  # two on a machine that is not loaded
        assert code in ((130, -signal.SIGTERM) if when == "connecting" else (130,)), errors
        assert "Traceback" not in errors
        if when == "running":
            assert json.loads(output.splitlines()[-1])["complete"] is False


def test_interrupt_while_standard_input_is_silent(speaker):
    """One Ctrl+C ends it, well: what was heard is transcribed. Three had been ignored."""
    process = started(speaker, "-", "--raw", RATE, stdin=subprocess.PIPE)
    process.stdin.write(bytes(2 * 3 * RATE))
    process.stdin.flush()
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    code = process.wait(30)
    output, errors = process.stdout.read().decode(), process.stderr.read().decode()
    process.stdin.close(), process.stdout.close(), process.stderr.close()
    assert code == 0, errors
    assert output.endswith("\n")
    assert "one" in output


def test_standard_input_without_samples_is_an_error(speaker):
    result = transcribe(speaker, "-", "--raw", RATE)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: standard input: holds no audio samples\n"
    result = transcribe(speaker, "-")
    assert (result.returncode, result.stderr) == (1, "error: standard input: is empty\n")


def test_a_pipe_in_place_of_a_file(speaker, tmp_path):
    command = f"cat {SAMPLE} | {sys.executable} {SCRIPT} /dev/stdin --url {speaker.url}; "
    command += f"{sys.executable} {SCRIPT} <(cat {SAMPLE}) --url {speaker.url}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    first, second = result.stdout.splitlines()
    assert first == second == transcribe(speaker, SAMPLE).stdout.strip()


def test_trouble_with_one_file_is_a_line_and_the_others_go_on(speaker, tmp_path):
    """A name that is no UTF-8; one too long for the mark; a folder in the way of the transcript."""
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.wav")
    long, blocked, good = (tmp_path / f"{name}.wav" for name in ("x" * 245, "blocked", "good"))
    for path in (strange, long, blocked, good):
        shutil.copy(SAMPLE, path)
    (tmp_path / "blocked.json").mkdir()
    result = transcribe(speaker, tmp_path, "-f", "json", "--quiet")
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {tmp_path}/blocked.json: cannot be written (Is a directory)",
        f"error: {tmp_path}/{'x' * 245}.json: cannot be written (File name too long)",
    ]
    for path in (tmp_path / "good.json", Path(strange).with_suffix(".json")):
        assert json.loads(path.read_text())["complete"] is True
        assert not path.with_name(path.name + ".unfinished").exists()


@pytest.fixture(scope="module")
def complete(speaker, tmp_path_factory):
    """A recording of two minutes, and the folder with its transcripts in all formats."""
    folder = tmp_path_factory.mktemp("complete")
    path = silence(folder / "a.wav", 120)
    assert transcribe(speaker, path, "-f", "all", "-o", f"{folder}/").returncode == 0
    return path, folder


@pytest.mark.parametrize("form", ["srt", "json", "jsonl", "vtt", "txt"])
def test_a_full_disk_leaves_what_was_written_before(speaker, complete, tmp_path, form):
    """The limit on a file's size is the disk: the file ends where it was last valid, marked, and one line says why."""
    path, folder = complete

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, 800))

    result = transcribe(speaker, path, "-f", form, "-o", f"{tmp_path}/out/", preexec_fn=limit)
    assert result.returncode == 1
    assert f"error: {tmp_path}/out/a.{form}: cannot be written (File too large)" in result.stderr
    assert (tmp_path / "out" / f"a.{form}.unfinished").exists()
    kept = (tmp_path / "out" / f"a.{form}").read_text()
    assert 400 < len(kept) <= 800
    if form == "json":
        assert len(json.loads(kept)["words"]) > 5
    elif form == "jsonl":
        assert all(json.loads(line)["text"] for line in kept.splitlines())
    else:
        assert (folder / f"a.{form}").read_text().startswith(kept.rsplit("\n\n", 2)[0])


def test_a_full_disk_behind_standard_output(speaker):
    with open("/dev/full", "w") as full:
        result = transcribe(speaker, SAMPLE, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (1, "error: standard output: No space left on device\n")


def test_closed_standard_output(speaker):
    command = f"{sys.executable} {SCRIPT} {SAMPLE} --url {speaker.url} >&-"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "error" not in result.stderr.lower()


def test_standard_output_that_cannot_show_a_character(tmp_path):
    with speaking(texts=[" Žluťoučký", " “naïve”", " 日本", " ♪"]) as speaker:
        for arguments in ([], ["-o", "-"]):
            environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
            result = transcribe(speaker, SAMPLE, *arguments, env=environment, text=False)
            assert result.returncode == 0, result.stderr
            assert b"\x93na\xefve\x94 ?? ? \x8elu?ou?k\xfd" in result.stdout
        environment["PYTHONIOENCODING"] = "ascii"
        assert "日本" in transcribe(speaker, SAMPLE, "-f", "jsonl", "-o", "-", env=environment, encoding="utf-8").stdout


def test_audio_is_not_overwritten_by_its_transcript(speaker, tmp_path):
    path = tmp_path / "a.txt"
    shutil.copy(SAMPLE, path)
    result = transcribe(speaker, path, "-f", "txt")
    assert result.returncode == 1
    assert "is an audio file" in result.stderr
    assert path.read_bytes() == SAMPLE.read_bytes()


def test_one_run_gives_up_once(tmp_path):
    """Six files and a server that goes away: one wait, one line, and none of them called complete."""
    with speaking(limit=100) as speaker:
        for number in range(6):
            shutil.copy(SAMPLE, tmp_path / f"{number}.wav")
        begun = time.monotonic()
        result = transcribe(speaker, tmp_path, "-f", "json", "--give-up-after", 3, "--parallel", 2)
        assert result.returncode == 1
        assert result.stderr.count("error: gave up after 3 s") == 1
        assert "files were not started" in result.stderr
        assert time.monotonic() - begun < 30  # six times three and the waits between would be more
        for path in tmp_path.glob("*.json"):
            assert json.loads(path.read_text())["complete"] is False
            assert path.with_name(path.name + ".unfinished").exists()


class Faulty:
    """A recording whose reading is broken by a fault of ours."""

    name, seconds, endless = "faulty", None, False

    def blocks(self):
        yield bytes(2 * RATE)
        raise KeyError("oops")


def test_a_fault_in_a_worker_is_told_and_ends_the_file(speaker):
    async def run() -> list:
        pool = Pool(Server(speaker.url), 3, asyncio.Event())
        pieces = (piece for number in range(2) for piece in cut(number, Faulty(), lambda: 3))
        async with asyncio.timeout(20):
            return [item async for _, item in pool.run(pieces) if isinstance(item, Exception)]

    first, second = asyncio.run(run())
    assert str(first).startswith("internal error, please report it: KeyError: 'oops' (test_writing.py, line ")
    assert str(second) == str(first)


@pytest.mark.slow
def test_all_sessions_have_work_to_the_end(tmp_path):
    """Ten minutes for 64 sessions: no piece is longer than a quarter of a minute, and each ends in a pause."""
    samples, words = talk(600, seed=5)
    path = write(tmp_path / "talk.wav", samples)
    pieces = list(cut(0, AudioFile(path), lambda: 64))
    assert len(pieces) >= 40
    for piece in pieces[1:]:
        assert not any(start <= piece.offset / RATE <= end for _, start, end in words)
    assert b"".join(block for piece in pieces for block in piece.blocks()) == b"".join(AudioFile(path).blocks())
    with speaking() as speaker:
        transcribe(speaker, path)
        assert speaker.sessions >= 40


def test_many_sessions_hold_little_audio():
    """Of ten hours, for any number of sessions, 31 MB of pieces at most are in memory; the last pieces are short."""
    for width in (1, 2, 4, 8, 16, 32, 60):
        shortest, longest = limits(36_000, width)
        assert 10 * RATE <= shortest <= 0.7 * longest
        assert width * longest <= HELD * RATE
        assert limits(10, width)[1] == 16 * RATE


def test_took_and_speed_count_from_the_beginning_of_the_file(tmp_path):
    """Two files at the pace of speech: the second's time is its own."""
    with speaking() as speaker:
        for name in ("a", "b"):
            silence(tmp_path / f"{name}.wav", 2)
        transcribe(speaker, tmp_path, "-f", "json", "--realtime")
        for name in ("a", "b"):
            found = json.loads((tmp_path / f"{name}.json").read_text())
            assert 1.9 < found["took"] < 3.5
            assert found["speed"] <= 1.05


def test_sessions_that_were_refused_are_none(tmp_path):
    with speaking(slots=2, crowded=True) as speaker:
        result = transcribe(speaker, silence(tmp_path / "a.wav", 300), "-o", tmp_path / "a.json", "--parallel", 6)
        assert result.returncode == 0
        assert speaker.refused
        assert json.loads((tmp_path / "a.json").read_text())["sessions"] == speaker.sessions


class Sparse(io.FileIO):
    """A file in which silence takes no room on the disk."""

    def write(self, data: bytes) -> int:
        if len(data) < 2**20:
            return super().write(data)
        self.truncate(self.seek(len(data), os.SEEK_CUR))
        return len(data)


def test_a_recording_goes_on_beyond_4_gib(tmp_path, monkeypatch):
    """37 hours of silence, and then sound."""
    path, hour = tmp_path / "a.wav", bytes(3600 * 2 * RATE)
    monkeypatch.setattr("voxtral_client.recording.open", lambda path, *_, **options: Sparse(path, "x"), raising=False)
    recording = Recording(path)
    recording.write(bytes(3200))
    assert soundfile.info(path).frames == 1600
    left = 2**32 - 1000 - 80 - 3200
    for _ in range(left // len(hour)):
        recording.write(hour)
    recording.write(hour[: left % len(hour)])
    assert path.stat().st_size == 2**32 - 1000
    for count in (500, 3200, 3200):
        recording.write(b"\1\0" * (count // 2))
        assert soundfile.info(path).frames == (path.stat().st_size - 80) // 2
    recording.close()
    assert path.stat().st_size > 2**32
    with soundfile.SoundFile(path) as file:
        file.seek(-3200, 2)
        assert (file.read(dtype="int16") == 1).all()
