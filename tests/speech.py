"""Speech whose words and word times are known, made from Debian's recorded prompts and espeak-ng.

Needs the package asterisk-core-sounds-en-wav (Allison Smith, CC BY-SA 3.0), as scripts/install-test-tools installs it.
"""

import random
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE = 16_000
PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
DIGITS = "zero one two three four five six seven eight nine".split()
ALPHABET = "alpha bravo charlie delta echo foxtrot golf hotel india kilo lima november oscar papa romeo tango".split()
DAYS = "sunday monday tuesday wednesday thursday friday saturday".split()
FILES = (
    {word: f"digits/{i}" for i, word in enumerate(DIGITS)}
    | {word: f"phonetic/{word[0]}_p" for word in ALPHABET}
    | {word: f"digits/day-{i}" for i, word in enumerate(DAYS)}
)
WORDS = list(FILES)


@cache
def clip(word: str) -> np.ndarray:
    """Return one spoken word without the silence around it, float32 at 16 kHz."""
    samples, rate = soundfile.read(PROMPTS / f"{FILES[word]}.wav", dtype="float32")
    samples = soxr.resample(samples, rate, RATE)
    power = np.convolve(samples**2, np.ones(160) / 160, "same")
    loud = np.flatnonzero(power > power.max() * 10**-3.5)
    return samples[loud[0] : loud[-1] + 1]


def say(words: list[str], gaps: list[float], lead: float = 0.5) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Speak `words`, each followed by its gap in seconds, after `lead` seconds of silence.

    Returns the samples (float32, 16 kHz) and for each word (text, start, end) in seconds.
    """
    parts, times, at = [np.zeros(round(lead * RATE), np.float32)], [], round(lead * RATE)
    for word, gap in zip(words, gaps, strict=True):
        sound = clip(word)
        times.append((word, at / RATE, (at + len(sound)) / RATE))
        parts += [sound, np.zeros(round(gap * RATE), np.float32)]
        at += len(sound) + len(parts[-1])
    return np.concatenate(parts), times


def talk(seconds: float, seed: int = 0) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Speak random words for about `seconds`: phrases of three to seven, then a pause of 0.7 to 1.5 s."""
    choose, words, gaps, length = random.Random(seed), [], [], 0.5
    while length < seconds:
        phrase = choose.randint(3, 7)
        words += choose.choices(WORDS, k=phrase)
        gaps += [choose.uniform(0.12, 0.3) for _ in range(phrase - 1)] + [choose.uniform(0.7, 1.5)]
        length += sum(len(clip(word)) / RATE for word in words[-phrase:]) + sum(gaps[-phrase:])
    return say(words, gaps)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """Write float samples as a WAV file with a little noise, so that no level reading is minus infinity."""
    noise = np.random.default_rng(0).normal(0, 1e-4, samples.shape)
    soundfile.write(path, samples + noise, rate)
    return path


def sparse_silence(path: Path, seconds: int) -> Path:
    """Write a WAV file of silence that takes no space on the disk."""
    soundfile.write(path, np.zeros(RATE // 2, np.int16), RATE)
    header = bytearray(path.read_bytes()[:44])
    header[4:8] = (36 + 2 * RATE * seconds).to_bytes(4, "little")
    header[40:44] = (2 * RATE * seconds).to_bytes(4, "little")
    with path.open("wb") as file:
        file.write(header)
        file.truncate(44 + 2 * RATE * seconds)
    return path
