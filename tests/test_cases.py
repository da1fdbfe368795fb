"""Audio as people have it: damaged, cut off, concatenated, late, in pipes. What can be heard is heard, at its own time.

The inputs are made here.
"""

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from servers import CHECKPOINT, ROOT, run_script

from voxtral_client import wav
from voxtral_client.errors import AudioError
from voxtral_client.media import AudioFile, is_audio
from voxtral_client.protocol import RATE

SAMPLE = CHECKPOINT / "sample.wav"
TEXT = (CHECKPOINT / "sample.txt").read_text().strip()
SOUND, _ = soundfile.read(SAMPLE, dtype="float32")
LENGTH = len(SOUND) / RATE
TUESDAY = slice(round(9.2 * RATE), round(10.0 * RATE))


def ffmpeg(*arguments: object) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True, stdin=subprocess.DEVNULL)


def made(path: Path, *options: object) -> Path:
    ffmpeg("-i", SAMPLE, *options, path)
    return path


def overwritten(path: Path, start: float, share: float) -> Path:
    """Overwrite a share of a file, from a share of it on, with what is no audio."""
    data = bytearray(path.read_bytes())
    first, count = int(start * len(data)), int(share * len(data))
    data[first : first + count] = np.random.default_rng(0).bytes(count)
    path.write_bytes(data)
    return path


def read(path, track: str | None = None) -> tuple[np.ndarray, str]:
    """Return all samples of a file, and what was said of damage."""
    blocks, said = [], ""
    try:
        for block in AudioFile(path, track).blocks():
            blocks.append(block)
    except AudioError as error:
        said = str(error)
    return np.frombuffer(b"".join(blocks), "<i2") / 32768, said


def shift(samples: np.ndarray, part: slice) -> float:
    """Return by how many seconds a part of the sample is later in `samples` than in the sample itself."""
    sound = SOUND[part] - SOUND[part].mean()
    size = 1 << (len(samples) + len(sound)).bit_length()
    match = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(sound, size).conj(), size)[: len(samples)]
    assert match.max() > 0.3 * np.square(sound).sum(), "not there"
    return (int(match.argmax()) - part.start) / RATE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.m4a", "a.mp3", "a.aac", "a.flac", "a.ogg", "a.opus", "a.mka", "a.ac3"])
def test_words_behind_damage_keep_their_times(tmp_path, name):
    codec = {"a.mka": ["-c:a", "flac", "-cluster_time_limit", 500], "a.ogg": ["-c:a", "libvorbis"]}.get(name, [])
    clean, said = read(made(tmp_path / name, *codec))
    assert said == ""
    usual = shift(clean, TUESDAY)
    assert abs(usual) < 0.1
    samples, said = read(overwritten(tmp_path / name, 0.3, 0.1))
    assert f"{name}: damaged audio: " in said
    assert "could not be decoded" in said
    if name != "a.aac":  # without a container it has no times, and FFmpeg does not say how much it passed over
        assert abs(shift(samples, TUESDAY) - usual) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.mp3", "a.flac", "a.mka", "a.webm", "a.aiff"])
def test_a_file_that_was_cut_off_says_so(tmp_path, name):
    path = made(tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    samples, said = read(path)
    assert "damaged audio" in said
    assert "breaks off after 7." in said or "breaks off after 6." in said
    assert 5 < len(samples) / RATE < 8


@pytest.mark.slow
def test_a_decoder_that_complains_without_end_blocks_nothing(tmp_path, capfd):
    ffmpeg("-stream_loop", 8, "-i", SAMPLE, tmp_path / "a.m4a")
    data = bytearray((tmp_path / "a.m4a").read_bytes())
    rng = np.random.default_rng(1)
    for at in range(20_000, len(data) - 20_000, 97):
        data[at] = rng.integers(256)
    (tmp_path / "a.m4a").write_bytes(data)
    samples, said = read(tmp_path / "a.m4a")
    assert "damaged audio" in said
    assert len(samples) / RATE == pytest.approx(9 * LENGTH, abs=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.ogg", "a.mp3", "a.opus", "a.wav"])
def test_recordings_behind_each_other(tmp_path, name):
    path = made(tmp_path / name, *(["-c:a", "libvorbis"] if name == "a.ogg" else []))
    once, _ = read(path)
    path.write_bytes(2 * path.read_bytes())
    samples, said = read(path)
    assert said == ""
    assert len(samples) == pytest.approx(2 * len(once), abs=0.1 * RATE)
    assert abs(shift(samples[len(once) :], TUESDAY)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.m4a", []),
        ("a.m4a", ["-movflags", "faststart"]),
        ("a.mp4", ["-movflags", "frag_keyframe+empty_moov", "-frag_duration", 500_000]),
        ("a.flv", ["-ar", 44100]),
        *((f"a.{ending}", []) for ending in "aiff caf w64 wma tta".split()),
    ],
)
def test_files_that_cat_has_joined(tmp_path, name, options):
    """Their index knows of the first recording only."""
    path = made(tmp_path / name, *options)
    once, _ = read(path)
    path.write_bytes(2 * path.read_bytes())
    samples, said = read(path)
    assert said == ""
    assert abs(shift(samples[len(once) :], TUESDAY) - shift(once, TUESDAY)) < 0.01
    assert len(samples) == pytest.approx(2 * len(once), abs=0.1 * RATE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "codec"), [("a.ul", "pcm_mulaw"), ("a.al", "pcm_alaw"), ("a.sln", "pcm_s16le")])
def test_telephone_audio_without_a_header(tmp_path, name, codec):
    made(tmp_path / "raw", "-ar", 8000, "-c:a", codec, "-f", codec.removeprefix("pcm_")).rename(tmp_path / name)
    samples, said = read(tmp_path / name)
    assert said == ""
    assert abs(shift(samples, TUESDAY)) < 0.01
    assert AudioFile(tmp_path / name).seconds == pytest.approx(LENGTH, abs=0.01)


def riff(size: int, tail: bytes = b"") -> bytes:
    """The sample as WAV with `size` in its header, and `tail` after it."""
    pcm = (SOUND * 32768).astype("<i2").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return b"RIFF\0\0\0\0WAVE" + form + struct.pack("<4sI", b"data", size) + pcm + tail


SIZE = 2 * len(SOUND)


def pour(pipe: Path, data: bytes) -> threading.Thread:
    """Make a pipe and write `data` into it from a thread. The reader may close it before the end."""

    def write() -> None:
        with contextlib.suppress(BrokenPipeError):
            pipe.write_bytes(data)

    os.mkfifo(pipe)
    writing = threading.Thread(target=write)
    writing.start()
    return writing


@pytest.mark.parametrize("how", ["path", "pipe"])
@pytest.mark.parametrize(
    ("size", "tail"),
    [
        pytest.param(0, b"", id="recorder that died"),
        pytest.param(0xFFFFFFFF, b"", id="written into a pipe"),
        pytest.param(0x7FFFFFFF, b"", id="arecord"),
        pytest.param(SIZE // 3, b"", id="header too short"),
        pytest.param(SIZE, b"LIST" + struct.pack("<I", 9000) + b"\x55\x7f" * 4500, id="metadata after it"),
    ],
)
def test_lengths_in_wav_headers(tmp_path, how, size, tail):
    path, data = tmp_path / "a.wav", riff(size, tail)
    if how == "path":
        path.write_bytes(data)
    else:
        writing = pour(path, data)
    samples, said = read(path)
    if how == "pipe":
        writing.join()
    assert said == ""
    assert np.array_equal(samples, (SOUND * 32768).astype("<i2") / 32768)


def test_a_copied_wav_that_lacks_its_end_is_not_complete(tmp_path):
    (tmp_path / "a.wav").write_bytes(riff(2 * SIZE))
    samples, said = read(tmp_path / "a.wav")
    assert len(samples) == len(SOUND)
    assert f"breaks off after {LENGTH:.1f} s of {2 * LENGTH:.1f}" in said


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s24le", "pcm_f32le", "pcm_mulaw", "adpcm_ima_wav"])
def test_other_kinds_of_wav(tmp_path, codec):
    samples, said = read(made(tmp_path / "a.wav", "-c:a", codec))
    assert said == ""
    assert abs(shift(samples, TUESDAY)) < 0.01
    samples, _ = read(made(tmp_path / "b.wav", "-c:a", codec, "-rf64", "always"))
    assert abs(shift(samples, TUESDAY)) < 0.01


def film(path: Path, delay: float = 0.0, **options) -> Path:
    """A film of 20 s whose sound starts late."""
    video = ["-f", "lavfi", "-i", "color=black:s=64x64:r=5:d=20"]
    ffmpeg(*video, "-itsoffset", delay, "-i", SAMPLE, "-c:v", "mpeg4", "-c:a", "aac", path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts", "a.mov"])
def test_a_track_that_starts_late(tmp_path, name):
    samples, said = read(film(tmp_path / name, 3.94))
    assert said == ""
    assert shift(samples, TUESDAY) == pytest.approx(3.94, abs=0.1)


@pytest.mark.slow
def test_a_gap_in_the_container_is_silence(tmp_path):
    path = tmp_path / "a.mkv"
    ffmpeg("-i", SAMPLE, "-af", "asetpts='if(gt(T,8),PTS+5/TB,PTS)'", "-c:a", "pcm_s16le", path)
    samples, said = read(path)
    assert said == ""
    assert shift(samples, TUESDAY) == pytest.approx(5, abs=0.1)
    assert np.abs(samples[round(8.3 * RATE) : round(12.7 * RATE)]).max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("step", ["25", "-5"])
def test_one_wrong_time_moves_nothing(tmp_path, step):
    """One block stands 25 s too late, or 5 s too early; those after it are right."""
    path = tmp_path / "a.mkv"
    wrong = f"setts=pts='PTS+eq(N,100)*{step}*1000'"  # Matroska counts milliseconds
    ffmpeg("-i", SAMPLE, "-f", "lavfi", "-i", "color=s=64x64:r=5:d=60", "-c:a", "aac", "-bsf:a:0", wrong, path)
    samples, said = read(path, "1")
    assert said == ""
    assert len(samples) / RATE == pytest.approx(LENGTH, abs=0.1)
    assert abs(shift(samples, TUESDAY)) < 0.1


@pytest.mark.slow
def test_times_that_contradict_each_other_are_reported(tmp_path):
    """Forty blocks are late: that is a gap, but then there is more audio than the container promises."""
    path = tmp_path / "a.mkv"
    ffmpeg("-i", SAMPLE, "-c:a", "aac", "-bsf:a", "setts=pts='PTS+between(N,100,140)*4000'", path)
    assert "its times contradict each other" in read(path)[1]


@pytest.fixture(scope="module")
def two_tracks(tmp_path_factory):
    """A film with a tone in English and, by default, the sample in German."""
    path = tmp_path_factory.mktemp("tracks") / "a.mkv"
    inputs = ["-f", "lavfi", "-i", "sine=440:r=44100:d=5", "-i", SAMPLE, "-map", 0, "-map", 1]
    tags = ["-metadata:s:a:0", "language=eng", "-metadata:s:a:1", "language=ger"]
    ffmpeg(*inputs, *tags, "-disposition:a:0", 0, "-disposition:a:1", "default", "-c:a", "aac", path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("track", "seconds"),
    [(None, LENGTH), ("1", 5), ("2", LENGTH), ("en", 5), ("ger", LENGTH), ("de", LENGTH), ("deu", None)],
)
def test_the_track_is_the_default_one_or_chosen(two_tracks, track, seconds):
    samples, said = read(two_tracks, track)
    if seconds is None:
        assert "no audio track deu; there are: 1 (eng), 2 (ger)" in said
    else:
        assert len(samples) / RATE == pytest.approx(seconds, abs=0.2)


def test_stereo_that_cancels_is_taken_from_one_channel(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([SOUND, -SOUND], axis=1), RATE)
    samples, _ = read(tmp_path / "a.wav")
    assert abs(shift(samples, TUESDAY)) < 0.01


@pytest.mark.slow
def test_rate_and_channels_that_change_on_the_way(tmp_path):
    """Two MP3 files of different kinds, one after the other."""
    first, second = made(tmp_path / "a.mp3", "-ar", 16000), made(tmp_path / "b.mp3", "-ar", 44100, "-ac", 2)
    first.write_bytes(first.read_bytes() + second.read_bytes())
    samples, said = read(first)
    assert said == ""
    assert len(samples) / RATE == pytest.approx(2 * LENGTH, abs=0.3)


@pytest.mark.slow
def test_live_webm_in_a_pipe_comes_as_it_is_written(tmp_path):
    """What the browser records: of no length, never to be sought in. The first words are there before the last."""
    path = made(tmp_path / "a.webm", "-c:a", "libopus", "-live", 1)
    data, pipe, half = path.read_bytes(), tmp_path / "pipe", threading.Event()
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            half.wait(30)
            file.write(data[len(data) // 2 :])

    writing = threading.Thread(target=write)
    writing.start()
    count = 0
    for block in AudioFile(pipe).blocks():
        count += len(block) // 2
        if count > 5 * RATE:
            half.set()
    writing.join()
    assert half.is_set()
    assert count / RATE == pytest.approx(LENGTH, abs=0.1)


@pytest.mark.slow
def test_a_film_whose_index_is_behind_the_pipe(tmp_path):
    data, pipe = film(tmp_path / "a.mp4").read_bytes(), tmp_path / "pipe"
    writing = pour(pipe, data)
    assert "save it to a file first" in read(pipe)[1]
    writing.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#EXTM3U\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "not an audio file"),
        (b"ffconcat version 1.0\nfile 'a.wav'\n", "not an audio file"),
        (b"#EXTM3U\n#EXTINF:9,\na.ts\n#EXT-X-ENDLIST\n", "not an audio file"),
        (riff(0)[:44], "holds no audio samples"),
        (b"\0" * 5000, "not an audio file"),
    ],
)
def test_what_is_no_audio(tmp_path, content, message):
    made(tmp_path / "a.wav")
    made(tmp_path / "a.ts")
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    assert message in read(path)[1]


@pytest.mark.slow
def test_a_film_without_sound_has_no_audio_track(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "color=black:s=64x64:d=1", tmp_path / "a.mp4")
    assert "has no audio track" in read(tmp_path / "a.mp4")[1]
    assert not is_audio(tmp_path / "a.mp4")


def test_a_wav_header_beyond_4_gib_is_read_again():
    for size in (0, 1000, 2**32 - 100, 2**32, 2**37):
        data = wav.header(size, RATE)
        assert wav.read_header(io.BytesIO(data).read) == (data, size)
        assert len(data) == 80
        with av.open(io.BytesIO(data), format="wav") as file:
            codec = file.streams.audio[0].codec_context
        assert (codec.name, codec.sample_rate, codec.channels) == ("pcm_s16le", RATE, 1)


@pytest.mark.slow
def test_folders_are_searched_by_what_is_in_the_files(tmp_path):
    """A container by any name is found; hidden files and AppleDouble's are not; links are followed, once."""
    sys.path.insert(0, str(ROOT))
    from voxtral_client.files import find

    talks = tmp_path / "talks"
    (talks / ".git").mkdir(parents=True)
    film(talks / "clip.m4v")
    made(talks / "no-ending", "-f", "flac")
    for name in ("._clip.m4v", ".hidden.wav", ".git/a.wav"):
        (talks / name).write_bytes(riff(SIZE))
    for name in ("notes.txt", "clip.srt", "clip.json"):
        (talks / name).write_text("1\n00:00:00,000 --> 00:00:01,000\nfive\n\n")
    (talks / "broken.mp3").write_text("no audio")
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.wav").write_bytes(riff(SIZE))
    (talks / "link").symlink_to(other)
    (talks / "again").symlink_to(talks)
    os.mkfifo(talks / "pipe")
    found = [str(Path(path).relative_to(talks)) for path in find([str(talks)])]
    assert found == ["broken.mp3", "clip.m4v", "link/b.wav", "no-ending"]


@pytest.mark.slow
def test_words_of_damaged_files_and_pipes(server, tmp_path):
    """Through the real server: exit codes, what is said, what is marked; and a WAV without its length from stdin."""
    overwritten(made(tmp_path / "damaged.m4a"), 0.3, 0.1)
    film(tmp_path / "late.mp4", 3.94)
    options = ["--url", server.url, "-f", "json", "-o", f"{tmp_path}/out/", "--quiet"]
    result = run_script("test_file_transcribe.py", tmp_path / "damaged.m4a", tmp_path / "late.mp4", *options)
    assert result.returncode == 1
    assert result.stderr.count("damaged audio") == 1
    damaged, late = (json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in ("damaged", "late"))
    assert damaged["complete"] is False
    assert "could not be decoded" in damaged["error"]
    assert (tmp_path / "out" / "damaged.json.unfinished").exists()
    (tuesday,) = [word for word in damaged["words"] if word["text"] == "tuesday"]
    assert tuesday["start"] == pytest.approx(9.3, abs=0.25)
    assert late["complete"] is True
    assert not (tmp_path / "out" / "late.json.unfinished").exists()
    assert late["words"][0]["start"] == pytest.approx(3.94 + 0.3, abs=0.25)
    result = run_script("test_file_transcribe.py", "-", "--url", server.url, stdin=None, input=riff(0), text=False)
    assert result.stdout.decode().strip() == TEXT
    assert result.returncode == 0
