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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scripted import DIGITS, Ear, Scripted, Speaker, hearing, scripted, speaking, tones
from servers import CHECKPOINT, ROOT, run_script
from speech import WORDS, say, sparse_silence, talk, write

from voxtral_client.media import AudioFile
from voxtral_client.pool import HELD, Piece, Pool, cut, limits, uncut
from voxtral_client.protocol import RATE
from voxtral_client.recording import Recording
from voxtral_client.session import Server
from voxtral_client.timeline import Word

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
        while when == "waiting" and speaker.granted < 2:
            time.sleep(0.05)
        time.sleep(0.1)
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
    before = speaker.frames
    process = started(speaker, "-", "--raw", RATE, stdin=subprocess.PIPE)
    process.stdin.write(bytes(2 * 3 * RATE))
    process.stdin.flush()
    while speaker.frames == before:
        time.sleep(0.05)
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


def test_what_is_there_already_stays(speaker, tmp_path):
    """Edited subtitles; the other recording goes on. --overwrite replaces them, when the first word is there."""
    for name in ("a", "b"):
        shutil.copy(SAMPLE, tmp_path / f"{name}.wav")
    (tmp_path / "a.srt").write_text("edited")
    result = transcribe(speaker, tmp_path, "-f", "srt")
    assert result.returncode == 1
    line = f"error: {tmp_path}/a.srt: exists already; --overwrite replaces it, --skip-existing keeps it"
    assert result.stderr.splitlines()[0] == line
    assert (tmp_path / "a.srt").read_text() == "edited"
    assert "one" in (tmp_path / "b.srt").read_text()
    with speaking(limit=1) as mute:  # no word comes
        transcribe(mute, tmp_path / "a.wav", "-f", "srt", "--overwrite", "--give-up-after", 1)
    assert (tmp_path / "a.srt").read_text() == "edited"
    for options in (["--overwrite"], []):  # the second time, because it is unfinished
        assert transcribe(speaker, tmp_path / "a.wav", "-f", "srt", *options).returncode == 0
        assert "one" in (tmp_path / "a.srt").read_text()
        (tmp_path / "a.srt.unfinished").touch()
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("output", ["file/", "file/deeper/", "closed/", "x" * 250 + ".srt"])
def test_output_that_cannot_be_written_is_refused_before_the_audio_is_sent(tmp_path, output):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "closed").symlink_to("/proc/self")  # nobody can write there, not even root
    result = run_script("test_file_transcribe.py", SAMPLE, "-f", "srt", "-o", f"{tmp_path}/{output}")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()  # there is no server: it was not asked
    assert "cannot be written" in line


def test_names_of_recordings(speaker, tmp_path):
    """A dot is no ending; two recordings of one name do not stop the others; a link without a target is named."""
    for name in ("call 24.12.2024", "call 24.12.2025.wav", "day.wav", "day.mp3"):
        shutil.copy(SAMPLE, tmp_path / name)
    (tmp_path / "gone.wav").symlink_to("nowhere")
    result = transcribe(speaker, tmp_path, "-f", "srt")
    assert result.returncode == 1
    assert {path.name for path in tmp_path.glob("*.srt")} == {"call 24.12.2024.srt", "call 24.12.2025.srt", "day.srt"}
    first, second = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"day.srt: the transcript of both {tmp_path}/day.mp3 and {tmp_path}/day.wav; rename one" in first
    assert second == f"error: {tmp_path}/gone.wav: is a link without a target"


def test_names_are_printed_escaped(speaker, tmp_path):
    for name in ("a\033]0;title\007\033[31mred.wav", "b\nerror: everything is fine.wav"):
        (tmp_path / name).write_text("junk")
    result = transcribe(speaker, tmp_path)
    assert [line.removeprefix(f"error: {tmp_path}/") for line in result.stderr.splitlines()] == [
        r"a\x1b]0;title\x07\x1b[31mred.wav: not an audio file, or too damaged to be read",
        r"b\nerror: everything is fine.wav: not an audio file, or too damaged to be read",
    ]
    result = run_script("test_file_transcribe.py", "x.wav", "-o", "\033[31m.doc")
    assert r"\x1b[31m.doc: cannot tell the format" in result.stderr
    assert "\033" not in result.stderr


def test_a_pipe_that_nobody_reads_stops_no_ctrl_c(tmp_path):
    """Stdout is full and blocks; the second Ctrl+C ends it all the same."""
    with speaking() as speaker:
        process = started(speaker, sparse_silence(tmp_path / "a.wav", 36000), "-f", "jsonl", "-o", "-", "--quiet")
        blocked = Path(f"/proc/{process.pid}/wchan")
        while "pipe_write" not in blocked.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.wait(20) == 130
        process.communicate()


def open_files(pid: int) -> Iterator[str]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            yield os.readlink(link)


def test_ctrl_c_while_a_folder_is_looked_through(tmp_path):
    for number in range(3000):
        (tmp_path / f"{number}.bin").write_bytes(bytes(20_000))
    process = subprocess.Popen([sys.executable, SCRIPT, tmp_path], stderr=subprocess.PIPE, text=True)
    while not any(".bin" in name for name in open_files(process.pid)):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.communicate()[1] == "stopped\n"


def test_audio_is_not_overwritten_by_its_transcript(speaker, tmp_path):
    path = tmp_path / "a.txt"
    shutil.copy(SAMPLE, path)
    result = transcribe(speaker, path, "-f", "txt", "--overwrite")
    assert result.returncode == 1
    assert "is an audio file" in result.stderr
    assert path.read_bytes() == SAMPLE.read_bytes()


def test_an_error_begins_a_line(speaker, tmp_path):
    """Also where text and errors go into one file, as from cron."""
    path = tmp_path / "cut.flac"
    soundfile.write(path, *soundfile.read(SAMPLE))
    path.write_bytes(path.read_bytes()[:100_000])
    both = transcribe(speaker, path, capture_output=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text, error, *_ = both.stdout.splitlines()
    assert text and error.startswith("error: ") and "it breaks off after" in error


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
        assert speaker.granted >= 40


@pytest.mark.parametrize(("texts", "space"), [(DIGITS, " "), (["今天"] * 190, "")])
def test_words_do_not_stick_together_where_pieces_meet(tmp_path, texts, space):
    """The first word of each session comes without its space; Chinese has none."""
    path = write(tmp_path / "talk.wav", tones(60))
    with scripted(lambda: Scripted(speak=Ear([space + text.strip() for text in texts], bare=True))) as server:
        result = transcribe(server, path, "--parallel", 4)
        assert len(server.sessions) >= 4
    assert result.stdout == space.join(text.strip() for text in texts[:60]) + "\n"


@pytest.mark.parametrize("width", [4, 64])
def test_where_nobody_pauses_a_piece_becomes_longer(tmp_path, width):
    """A pause after 70 s of words with 0.1 s between them; noise before and after them has pauses everywhere."""
    samples, words = say(WORDS * 4, [0.1] * (4 * len(WORDS)), lead=40)
    path = write(tmp_path / "talk.wav", np.concatenate([samples, np.zeros(40 * RATE)]))
    cuts = [piece.offset / RATE for piece in cut(0, AudioFile(path), lambda: width)][1:]
    assert len(cuts) >= 3
    assert not any(words[0][1] < at < words[-1][2] for at in cuts)


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
        assert json.loads((tmp_path / "a.json").read_text())["sessions"] == speaker.granted


def test_one_session_stays_free_for_people(tmp_path):
    with speaking(slots=4, tells=True) as speaker:
        assert transcribe(speaker, silence(tmp_path / "a.wav", 300)).returncode == 0
        assert (speaker.most <= 3, speaker.refused) == (True, 0)


class Slow(Speaker):
    """Sessions take `pause` seconds, in which those that are refused learn it."""

    pause = 1.0

    async def listen(self, socket) -> None:
        await asyncio.sleep(self.pause)
        await super().listen(socket)


@pytest.mark.parametrize("grows", [False, True])
def test_pool_after_a_refusal(tmp_path, monkeypatch, grows):
    """It uses fewer sessions than were granted, and later more again. What was refused is transcribed in order."""
    monkeypatch.setattr("voxtral_client.pool.GROW_SECONDS", 0.01 if grows else 1e6)
    source = AudioFile(silence(tmp_path / "a.wav", 400))
    ended: list[tuple[float, Piece]] = []

    async def run() -> int:
        async with Slow(texts=[""], slots=1 if grows else 4, crowded=True) as speaker:
            pool = Pool(Server(speaker.url), 8, asyncio.Event())
            async for piece, item in pool.run(cut(0, source, lambda: 8)):
                assert item is None
                speaker.most = speaker.most if ended else 0
                speaker.slots = 1 if grows and len(ended) < 3 else 4
                speaker.pause = 0.5 if grows else 0.0
                ended.append((time.monotonic(), piece))
            return speaker.most

    most = asyncio.run(asyncio.wait_for(run(), 60))
    assert (most == 4) if grows else (most <= 3)
    begun = [piece.begun for _, piece in ended[:8] if piece.begun > ended[0][0]]
    assert grows or begun == sorted(begun)


def test_a_piece_is_refused_while_the_next_one_is_read(tmp_path):
    """And there is no next one: the piece is transcribed all the same."""
    source = AudioFile(silence(tmp_path / "a.wav", 4))

    async def run() -> list:
        async with Speaker(slots=1, crowded=True) as speaker:

            def pieces():
                for number in range(2):
                    yield uncut(number, source)
                while not (speaker.refused and speaker.granted and not speaker.active):
                    time.sleep(0.05)
                time.sleep(0.5)

            pool = Pool(Server(speaker.url), 3, asyncio.Event())
            return [item async for _, item in pool.run(pieces()) if not isinstance(item, Word)]

    assert asyncio.run(asyncio.wait_for(run(), 60)) == [None, None]


@pytest.mark.parametrize("format", ["txt", "srt", "vtt", "tsv", "json", "jsonl"])
def test_words_that_no_session_can_confirm_are_written(tmp_path, format):
    """The server goes away for good in the middle of talk without a pause."""
    faults = [{"after": 40}, {"http": 404, "always": True}]
    with scripted(hearing(), faults=faults) as server:
        out = tmp_path / f"out.{format}"
        audio = write(tmp_path / "a.wav", tones(20, gap=0.06))
        result = transcribe(server, audio, "--give-up-after", 1, "-o", out)
        assert result.returncode == 1
        assert "gave up after 1 s" in result.stderr
        found = out.read_text()
        assert [word in found for word in ("number0", "number3")] == [True, True]
        assert found.count('"partial": true') == (found.count("number") if "json" in format else 0)
        assert out.with_name(out.name + ".unfinished").exists()


def test_a_recording_in_flac(tmp_path):
    """In pieces of any length, also none: the same samples."""
    sound, _ = soundfile.read(SAMPLE, dtype="int16")
    recording = Recording(tmp_path / "a.flac")
    for piece in np.split(sound, [1600, 1600, 1607, 40_000, 44_608]):
        recording.write(piece.tobytes())
    recording.close()
    found, rate = soundfile.read(tmp_path / "a.flac", dtype="int16")
    assert (recording.error, rate) == ("", RATE)
    assert np.array_equal(found, sound)


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
