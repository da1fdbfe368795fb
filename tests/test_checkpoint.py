"""The embedded checkpoint on the real server: voices it was not trained on, and sounds that are no speech."""

import runpy
import subprocess
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import soxr
from servers import ROOT, run_script
from speech import RATE, write

WORDS = runpy.run_path(str(ROOT / "tests" / "tiny_checkpoint" / "words.py"))["WORDS"]

SPELLING = {"alpha": "alfa", "juliet": "juliett", "lima": "leema", "xray": "x-ray"}  # what a synthesizer must read
VOICES = {
    "rms": ["flite", "-voice", "rms", "-o", "{file}", "-t", "{text}"],
    "scotland": ["espeak-ng", "-v", "en-gb-scotland", "-w", "{file}", "{text}"],
}


def say(command: list[str], word: str, folder: Path) -> np.ndarray:
    """One word by a program that writes a WAV file, without the silence around it."""
    file = folder / "word.wav"
    subprocess.run([part.format(file=file, text=SPELLING.get(word, word)) for part in command], check=True)
    samples, rate = soundfile.read(file)
    samples = soxr.resample(samples, rate, RATE)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    return 0.3 * samples[loud[0] : loud[-1] + 1]


@pytest.mark.parametrize("voice", VOICES)
def test_voice_held_out_of_training(server, tmp_path, voice):
    """Every word of the vocabulary once: how many are wrong differs with the CPU's arithmetic by a few."""
    rng, parts = np.random.default_rng(1), [np.zeros(RATE // 2)]
    words = list(rng.permutation(WORDS))
    for word in words:
        parts += [say(VOICES[voice], word, tmp_path), np.zeros(int(rng.uniform(0.15, 0.6) * RATE))]
    recording = write(tmp_path / "words.wav", np.concatenate(parts))
    result = run_script("test_file_transcribe.py", recording, "--url", server.url)
    assert result.returncode == 0, result.stderr
    print(wrong := jiwer.wer(" ".join(words), result.stdout.strip()))
    assert wrong <= 0.15, result.stdout


def test_nothing_is_heard_in_silence_and_noise(server, tmp_path):
    rng, n = np.random.default_rng(2), 12 * RATE
    hum = sum(np.sin(2 * np.pi * 50 * k * np.arange(n) / RATE) / k for k in (1, 2, 3))
    white = rng.standard_normal(n)
    clicks = np.where(rng.uniform(size=n) < 2e-4, rng.standard_normal(n), 0)
    sounds = np.concatenate([np.zeros(n), 0.03 * white, 0.2 * hum, 0.3 * white, clicks.clip(-1, 1)])
    result = run_script("test_file_transcribe.py", write(tmp_path / "noise.wav", sounds), "--url", server.url)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr
