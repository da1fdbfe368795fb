"""Audio files of any rate and channel count become the same 16 kHz mono PCM16, without seams or wrap-around."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import soxr
from servers import ROOT
from speech import sparse_silence

from voxtral_client.audio import Resampler, to_pcm16
from voxtral_client.errors import AudioError
from voxtral_client.media import AudioFile


def tone(rate: int, seconds: float, level: float = 0.5, frequency: float = 440.0) -> np.ndarray:
    return level * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def read(path) -> np.ndarray:
    return np.frombuffer(b"".join(AudioFile(path).blocks()), "<i2")


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_rate_and_channel_count(tmp_path, rate, channels):
    path = tmp_path / "tone.wav"
    soundfile.write(path, np.repeat(tone(rate, 2.5)[:, None], channels, axis=1), rate)
    samples = read(path)
    assert abs(len(samples) - 2.5 * 16000) <= 1
    inner = slice(1600, -1600)  # a resampler rings at the ends
    assert np.abs(samples[inner] / 32768 - tone(16000, 2.5)[: len(samples)][inner]).max() < 0.003


def test_blocks_leave_no_seams():
    """Block by block gives the samples of resampling all at once."""
    samples = np.random.default_rng(0).normal(0, 0.1, 44100).astype(np.float32)
    convert = Resampler(44100)
    blocks = [convert(block[:, None]) for block in np.split(samples, [1000, 1001, 20000, 44000])]
    pieces = np.frombuffer(b"".join([*blocks, convert(np.zeros((0, 1), np.float32), last=True)]), "<i2")
    whole = np.frombuffer(to_pcm16(soxr.resample(samples, 44100, 16000)), "<i2")
    assert len(pieces) == len(whole)
    assert np.abs(pieces.astype(int) - whole).max() <= 1


def test_loud_audio_is_clipped_not_wrapped():
    pcm = np.frombuffer(to_pcm16(np.array([1.5, 1.0, -1.0, -1.5, 0.0, np.nan])), "<i2")
    assert pcm.tolist() == [32767, 32767, -32768, -32768, 0, 0]


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a.opus"])
def test_compressed_formats(tmp_path, name):
    path = tmp_path / name
    soundfile.write(path, tone(48000, 1.0), 48000, format="OGG" if name == "a.opus" else None,
                    subtype="OPUS" if name == "a.opus" else None)  # fmt: skip
    assert abs(len(read(path)) / 16000 - 1.0) < 0.1


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "is empty"), (b"Dear diary,\n" * 99, "not an audio file")],
)
def test_files_that_are_no_audio(tmp_path, content, message):
    path = tmp_path / "x.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AudioError, match=message):
        _ = AudioFile(path).seconds


@pytest.mark.slow
def test_an_hour_needs_no_more_memory_than_a_minute(tmp_path):
    """An hour of (sparse) WAV, read to the end in a process of its own: peak memory as for a short file."""
    script = (
        "import re, sys; sys.path.insert(0, sys.argv[1])\n"
        "from voxtral_client.media import AudioFile\n"
        "n = sum(len(b) for b in AudioFile(sys.argv[2]).blocks())\n"
        "print(n, re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    peaks = []
    for name, seconds in (("short.wav", 60), ("long.wav", 3600)):
        path = sparse_silence(tmp_path / name, seconds)
        output = subprocess.run([sys.executable, "-c", script, ROOT, path], capture_output=True, text=True, check=True)
        size, peak = map(int, output.stdout.split())
        assert size == seconds * 32000
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 8 * 1024  # KiB
    assert peaks[1] < 150 * 1024
