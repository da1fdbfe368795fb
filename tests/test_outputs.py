"""Subtitles, JSON, many files, several sessions at once: as a user of test_file_transcribe.py gets them."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import srt
import webvtt
from scripted import speaking
from servers import CHECKPOINT, ROOT, run_script
from speech import WORDS, say, sparse_silence, talk, write

from voxtral_client.outputs import Output
from voxtral_client.subtitles import LIMITS, LONGEST, SHORTEST
from voxtral_client.timeline import Word

TEXT = (CHECKPOINT / "sample.txt").read_text().strip()


def transcribe(server, *arguments, **options) -> subprocess.CompletedProcess:
    return run_script("test_file_transcribe.py", *arguments, "--url", server.url, **options)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A talk of 90 s, longer than a session of the server, and its words with their times."""
    samples, words = talk(90, seed=11)
    return write(tmp_path_factory.mktemp("audio") / "talk.wav", samples), words


@pytest.fixture(scope="module")
def one_session(server, recording, tmp_path_factory):
    """The recording through one session at a time, in all formats."""
    folder = tmp_path_factory.mktemp("one")
    formats = [argument for form in ("txt", "srt", "vtt", "json") for argument in ("-f", form)]
    result = transcribe(server, recording[0], "--parallel", 1, "-o", folder, *formats)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    return folder


def test_word_times(one_session, recording):
    """95 % of words within 160 ms of the truth, start and end, and none more than 400 ms off."""
    found = json.loads((one_session / "talk.json").read_text())
    assert [word["text"] for word in found["words"]] == [text for text, _, _ in recording[1]]
    starts = [abs(a["start"] - b[1]) for a, b in zip(found["words"], recording[1], strict=True)]
    ends = [abs(a["end"] - b[2]) for a, b in zip(found["words"], recording[1], strict=True)]
    for errors in (starts, ends):
        assert np.percentile(errors, 95) <= 0.160
        assert max(errors) <= 0.400


def test_json_tells_of_the_run(one_session, recording):
    found = json.loads((one_session / "talk.json").read_text())
    assert found["complete"] is True
    assert found["seconds"] == pytest.approx(soundfile.info(recording[0]).duration, abs=0.01)
    assert found["usage"]["completion_tokens"] >= found["seconds"] / 0.08
    assert found["usage"]["prompt_tokens"] == 39 * found["sessions"]
    assert {word["session"] for word in found["words"]} <= set(range(1, found["sessions"] + 1))
    assert found["speed"] > 0


def test_subtitles_pass_strict_parsers(one_session, recording):
    text = " ".join(word for word, _, _ in recording[1])
    cues = list(srt.parse((one_session / "talk.srt").read_text(), ignore_errors=False))
    captions = webvtt.read(one_session / "talk.vtt").captions
    assert [cue.content for cue in cues] == [caption.text for caption in captions]
    assert " ".join(" ".join(cue.content.split()) for cue in cues) == text
    assert [cue.index for cue in cues] == list(range(1, len(cues) + 1))
    assert len(cues) > 10
    check_cues([(cue.start.total_seconds(), cue.end.total_seconds(), cue.content) for cue in cues])


def check_cues(cues: list[tuple[float, float, str]]) -> None:
    for start, end, content in cues:
        assert SHORTEST - 1e-6 <= end - start <= LONGEST + 1e-6
        lines = content.split("\n")
        assert len(lines) <= LIMITS.lines
        assert max(map(len, lines)) <= LIMITS.columns
    for (_, end, _), (start, _, _) in pairwise(cues):
        assert end <= start


def test_ffmpeg_accepts_the_subtitles(one_session):
    for name in ("talk.srt", "talk.vtt"):
        command = ["ffmpeg", "-v", "error", "-xerror", "-i", one_session / name, "-f", "srt", "-"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.count("-->") == (one_session / name).read_text().count("-->")


def test_plain_text(one_session, recording):
    assert (one_session / "talk.txt").read_text() == " ".join(word for word, _, _ in recording[1]) + "\n"


def test_parallel_sessions_give_the_same_words(server, one_session, recording, tmp_path):
    result = transcribe(server, recording[0], "--parallel", 4, "-o", tmp_path / "p.json")
    assert result.returncode == 0, result.stderr
    single, parallel = (json.loads(p.read_text()) for p in (one_session / "talk.json", tmp_path / "p.json"))
    assert [word["text"] for word in parallel["words"]] == [word["text"] for word in single["words"]]
    for a, b in zip(parallel["words"], single["words"], strict=True):
        assert abs(a["end"] - b["end"]) <= 0.161
    assert parallel["sessions"] >= 3
    assert not (tmp_path / "p.json.unfinished").exists()


def test_talk_without_a_pause_is_not_cut_in_words(server, tmp_path):
    """56 s of words with 0.1 s between them, which four sessions had cut in three places in a word."""
    samples, words = say(random.Random(5).choices(WORDS, k=84), [0.1] * 84)
    path, wanted = write(tmp_path / "talk.wav", samples), [text for text, _, _ in words]
    single, several = (transcribe(server, path, "--parallel", n).stdout.split() for n in (1, 4))
    assert several == single
    assert len(set(wanted) - set(single)) <= 1


def test_more_sessions_than_slots(server, recording):
    """Asked for more than the server's four slots, it makes do with those, without a word."""
    result = transcribe(server, recording[0], "--parallel", 16)
    assert result.returncode == 0
    assert result.stdout.split() == [text for text, _, _ in recording[1]]
    assert "waiting" not in result.stderr


@pytest.fixture
def folder(tmp_path):
    """A folder with recordings in several formats, one bad file and one that is no audio by its name."""
    samples, rate = soundfile.read(CHECKPOINT / "sample.wav")
    source = tmp_path / "in"
    (source / "deeper").mkdir(parents=True)
    soundfile.write(source / "a.flac", samples, rate)
    soundfile.write(source / "deeper" / "b.mp3", samples, rate)
    (source / "bad.wav").write_text("not audio")
    (source / "notes.md").write_text("not audio")
    command = ["ffmpeg", "-v", "error", "-i", CHECKPOINT / "sample.wav", "-c:a", "aac", source / "c.m4a"]
    subprocess.run(command, check=True)
    return source


def test_folder_with_a_bad_file(server, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    result = transcribe(server, folder, "-o", out, "-f", "txt")
    assert result.returncode == 1
    assert "bad.wav: not an audio file" in result.stderr
    assert "3 files" in result.stderr
    assert "1 failed" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["a.txt", "b.txt", "c.txt"]
    for path in out.iterdir():
        assert path.read_text() == TEXT + "\n"
    # once more: nothing is left to do but the bad one
    (out / "b.txt.unfinished").touch()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    result = transcribe(server, folder, "-o", out, "-f", "txt", "--skip-existing")
    assert "2 already transcribed" in result.stderr
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert [name for name in after if after[name] != before[name]] == ["b.txt"]


def test_empty_folder(server, tmp_path):
    result = transcribe(server, tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "no audio files in this folder" in result.stderr


def test_standard_input(server):
    wav = (CHECKPOINT / "sample.wav").read_bytes()
    result = transcribe(server, "-", stdin=None, input=wav, text=False)
    assert result.stdout.decode() == TEXT + "\n", result.stderr
    samples, _ = soundfile.read(CHECKPOINT / "sample.wav", dtype="int16")
    result = transcribe(
        server, "-", "--raw", 16000, "-o", "-", "-f", "srt", stdin=None, input=samples.tobytes(), text=False
    )
    cues = list(srt.parse(result.stdout.decode(), ignore_errors=False))
    assert " ".join(" ".join(cue.content.split()) for cue in cues) == TEXT
    result = transcribe(server, "-", stdin=None, input=b"hello", text=False)
    assert result.returncode == 1
    assert b"--raw RATE" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.wav", "-o", "y.doc"], "cannot tell the format"),
        (["x.wav", "-o", "out"], "or in / for a folder"),
        (["x.wav", "-o", "y.srt", "-f", "srt", "-f", "vtt"], "write a folder with /"),
        (["x.wav", "--skip-existing"], "--format or --output"),
        (["x.wav", "--raw", "16000"], "goes with -"),
        (["x.wav", "--parallel", "0"], "1 or more"),
    ],
)
def test_usage(arguments, message):
    result = run_script("test_file_transcribe.py", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_two_files_for_one_output(server, folder):
    shutil.copy(folder / "a.flac", folder / "a.wav")
    result = transcribe(server, folder / "a.flac", folder / "a.wav", "-f", "srt")
    assert result.returncode == 1
    assert "the transcript of both" in result.stderr
    assert (folder / "a.srt").exists()


def test_killed_in_the_middle_the_subtitles_are_valid(server, tmp_path):
    """kill -9 in a ten-minute file: the SRT holds all words committed so far."""
    samples, words = talk(600, seed=12)
    path, out = write(tmp_path / "long.wav", samples), tmp_path / "long.srt"
    command = [
        sys.executable,
        ROOT / "test_file_transcribe.py",
        path,
        "--url",
        server.url,
        "-o",
        out,
        "--parallel",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out.exists() and len(out.read_bytes()) > 900):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cues = list(srt.parse(out.read_text(), ignore_errors=False))
    got = " ".join(cue.content for cue in cues).split()
    assert len(got) > 50
    assert got == [text for text, _, _ in words][: len(got)]
    assert cues[-1].end.total_seconds() == pytest.approx(words[len(got) - 1][2], abs=1.1)
    assert out.with_name("long.srt.unfinished").exists()


@pytest.mark.slow
def test_ten_hours_start_at_once_in_little_memory(tmp_path):
    """Ten hours of (sparse) silence: words of the first minutes are written before the rest is read, in 150 MB."""
    out, seconds = tmp_path / "x.json", 36000
    path = sparse_silence(tmp_path / "long.wav", seconds)
    with speaking() as speaker:
        command = [sys.executable, ROOT / "test_file_transcribe.py", path, "--url", speaker.url, "-o", out]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not (out.exists() and out.stat().st_size > 100_000):
            assert process.poll() is None
            time.sleep(0.05)
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert json.loads(out.read_text())["complete"] is False
    assert (tmp_path / "x.json.unfinished").exists()
    assert 10 < float(errors.rsplit(" s of audio", 1)[0].split()[-1]) < seconds
    assert int(status["VmHWM"].split()[0]) < 150 * 1024


def test_json_lines(server, tmp_path):
    """A line for each final word; the last line says how each file ended. Joined, the texts are the transcript."""
    (tmp_path / "bad.wav").write_text("not audio")
    sample = CHECKPOINT / "sample.wav"
    result = transcribe(server, sample, tmp_path / "bad.wav", "-f", "jsonl", "-o", "-", "--quiet")
    assert result.returncode == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    words, ends = [line for line in lines if "text" in line], [line for line in lines if "complete" in line]
    assert "".join(word["text"] for word in words).strip() == TEXT
    assert all(a["start"] < a["end"] <= b["start"] for a, b in pairwise(words))
    assert len(words) + len(ends) == len(lines)
    good, bad = sorted(ends, key=lambda line: not line["complete"])
    assert good["audio"] == str(sample)
    assert good["seconds"] == pytest.approx(soundfile.info(sample).duration, abs=0.01)
    assert good["sessions"] == 1
    assert "error" not in good
    assert (bad["complete"], bad["audio"]) == (False, str(tmp_path / "bad.wav"))
    assert "not an audio file" in bad["error"]


@pytest.mark.parametrize("form", ["srt", "vtt"])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("今天天气很好，我们一起去公园散步吧。你觉得怎么样", ["今天天气很好，我们一起去公园散步", "吧。你觉得怎么样"]),
        ("これは「テスト」です、とても長い、文章になります", ["これは「テスト」です、とても長", "い、文章になります"]),
        ("오늘은 날씨가 아주 좋습니다 공원에 갑니다", ["오늘은 날씨가 아주 좋습니다 공원에", "갑니다"]),
        ("x" * 50, ["x" * 42, "x" * 8]),
    ],
)
def test_lines_of_wide_characters(tmp_path, form, text, lines):
    """16 in a line; it begins with no punctuation, and Korean breaks at spaces."""
    writer = Output(tmp_path / f"x.{form}", form)
    writer.write(Word(text, 0.5, 5.0, 1))
    writer.close(True)
    assert (tmp_path / f"x.{form}").read_text().strip().splitlines()[-2:] == lines


@pytest.mark.parametrize("end", [".", "?!", "।", "؟", "。", "！」", '."', ".”", "?»", "۔", "…)"])
def test_a_sentence_ends_its_cue_in_all_languages(tmp_path, end):
    writer = Output(tmp_path / "x.srt", "srt")
    for number, text in enumerate([" A", f" word{end}", " Next"]):
        writer.write(Word(text, number, number + 0.9, 1))
    writer.close(True)
    assert [cue.content for cue in srt.parse((tmp_path / "x.srt").read_text())] == [f"A word{end}", "Next"]


def test_markup_is_escaped_and_every_format_is_whole_at_any_time(tmp_path):
    words = [
        Word(" a-->b", 0.0, 0.4, 1),
        Word(" <i>&", 0.5, 0.9, 1),
        Word(" end.", 1.0, 1.5, 1),
        Word(" {x}", 3, 3.4, 1),
    ]
    for form in ("srt", "vtt", "json"):
        path = tmp_path / f"x.{form}"
        writer = Output(path, form)
        for count, word in enumerate(words, 1):
            writer.write(word)
            text = path.read_text()
            if form == "json":
                assert len(json.loads(text)["words"]) == count
            elif form == "srt":
                cues = list(srt.parse(text, ignore_errors=False))
                assert len(" ".join(cue.content for cue in cues).split()) == count
                assert all("-->" not in cue.content and "<" not in cue.content for cue in cues)
            else:
                captions = webvtt.read(path).captions
                assert len(" ".join(caption.text for caption in captions).split()) == count
                assert "&lt;i&gt;&amp;" in text or count < 2
        writer.close(True)
