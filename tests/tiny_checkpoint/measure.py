"""Measure a checkpoint on a running vLLM server: word error rates, word times and false alarms.

    python measure.py CLIPS                    measures the model `tiny` of the server on port 8000
    python measure.py CLIPS --write FOLDER     writes the sentences of the held-out voices, for ../../evaluate.py

CLIPS is the folder of make_data.py. Each voice reads its words in random order, with pauses of 0.1 to 0.6 s, 60 dB
above the noise. A word's time is 0.08 (frame + 1) s, with the frame of its first piece. The lag is that time minus the
word's true end.
"""

import argparse
import asyncio
import csv
import sys
from pathlib import Path

import numpy as np
import soundfile
from rapidfuzz.distance import Levenshtein
from scipy.signal import lfilter
from streams import RATE, clips
from words import DIGITS, WORDS

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from voxtral_client.audio import to_pcm16
from voxtral_client.session import Done, Server

SERVER = Server("ws://127.0.0.1:8000/v1/realtime")
FREE = asyncio.Semaphore(4)  # sessions at once
# voice, words, utterances
HELD_OUT = [("fsdd-theo", DIGITS, 30), ("flite-rms", WORDS, 14), ("espeak-en-gb-scotland", WORDS, 14)]
TRAINED = [("allison", WORDS, 14), ("fsdd-george", DIGITS, 10), ("kokoro", WORDS, 7)]


def clips_by_voice(folder: Path) -> dict[str, dict[str, list]]:
    """Return voice -> word -> [(samples at 16 kHz, end of the word in seconds)]. The Kokoro voices count as one."""
    voices: dict = {}
    for clip, words, ends, voice, _ in clips(sorted(folder.glob("*.npz"))):
        if words[0] >= 0 and words[1] < 0:
            voice = "kokoro" if voice.startswith("kokoro") else voice
            voices.setdefault(voice, {}).setdefault(WORDS[words[0]], []).append((clip, float(ends[0])))
    return voices


def utterance(said: dict[str, list], words: list[str], rng: np.random.Generator) -> tuple[np.ndarray, list[float]]:
    """Return a sentence (samples at 16 kHz), and the end of each word in seconds."""
    audio, ends = [np.zeros(int(rng.uniform(0.1, 0.5) * RATE))], []
    for word in words:
        clip, end = said[word][rng.integers(len(said[word]))]
        ends.append(sum(map(len, audio)) / RATE + end)
        audio += [clip, np.zeros(int(rng.uniform(0, 0.5) * RATE))]  # a clip's own margins add 0.1 s
    audio = 0.3 * np.concatenate(audio)
    return audio + 1e-4 * rng.standard_normal(len(audio)), ends


def sounds(rng: np.random.Generator, seconds: int = 20) -> dict[str, np.ndarray]:
    """Return sounds at 16 kHz in which the model must recognize no word, by their names."""
    n = seconds * RATE
    white, t = rng.standard_normal(n), np.arange(n) / RATE
    pink = lfilter([1], [1, -0.97], white)
    notes = 220 * 2 ** (rng.integers(0, 24, seconds * 3) / 12)
    melody = np.repeat(notes, RATE // 3)[:n]
    melody = np.pad(melody, (0, n - len(melody)), mode="edge")
    tune = sum(np.sin(2 * np.pi * k * np.cumsum(melody) / RATE) / k for k in (1, 2, 3)) * np.exp(-3 * (t * 3 % 1))
    clicks = np.where(rng.uniform(size=n) < 2e-4, rng.standard_normal(n), 0)
    out = {"silence": 0 * t, "white noise": 0.03 * white, "loud white noise": 0.3 * white,
           "pink noise": 0.05 * pink / pink.std(), "loud pink noise": 0.3 * pink / pink.std(),
           "hum": 0.2 * sum(np.sin(2 * np.pi * 50 * k * t) / k for k in (1, 2, 3)), "tune": 0.2 * tune,
           "clicks": clicks}  # fmt: skip
    return out


async def transcribe(audio: np.ndarray) -> list[str]:
    """Return the text of each frame of `audio`, samples at 16 kHz."""
    pcm, frames = to_pcm16(audio), []
    async with FREE, SERVER.session("tiny") as session:
        for i in range(0, len(pcm), 2**15):
            await session.send(pcm[i : i + 2**15])
        await session.finish()
        while not isinstance(item := await session.receive(), Done):
            frames.append(item)
    return frames


def write(folder: Path, voice: str, said: list[tuple[list[str], np.ndarray]]) -> None:
    """Write a voice's sentences, and add them to a manifest for the repository's evaluate.py."""
    (folder / voice).mkdir(parents=True, exist_ok=True)
    with (folder / "manifest.csv").open("a", newline="") as file:
        lines = csv.writer(file)
        if not file.tell():
            lines.writerow(["audio", "text", "voice"])
        for i, (words, audio) in enumerate(said):
            name = f"{voice}/{i:02}.wav"
            soundfile.write(folder / name, np.frombuffer(to_pcm16(audio), "<i2"), RATE)
            lines.writerow([name, " ".join(words), voice])


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="only write the sentences of the held-out voices")
    options = parser.parse_args()
    if options.write and options.write.exists():
        parser.error(f"{options.write} exists")
    rng = np.random.default_rng(7)
    voices = clips_by_voice(options.clips)
    for voice, vocabulary, count in HELD_OUT + ([] if options.write else TRAINED):
        if voice not in voices:
            continue
        vocabulary = [word for word in vocabulary if word in voices[voice]]  # Allison's prompts lack yes and no
        order = [list(rng.permutation(vocabulary)[:11]) for _ in range(count)]
        made = [utterance(voices[voice], words, rng) for words in order]
        if options.write:
            write(options.write, voice, [(words, audio) for words, (audio, _) in zip(order, made, strict=True)])
            continue
        results = await asyncio.gather(*(transcribe(audio) for audio, _ in made))
        errors, lags, wrong = 0, [], []
        for words, (_, ends), frames in zip(order, made, results, strict=True):
            recognized = "".join(frames).split()
            errors += Levenshtein.distance(words, recognized)
            if words == recognized:
                times = [0.08 * (i + 1) for i, text in enumerate(frames) if text.startswith(" ")]
                lags += [time - end for time, end in zip(times, ends, strict=True)]
            else:
                wrong.append(f"  said       {' '.join(words)}\n  recognized {' '.join(recognized)}")
        total = sum(map(len, order))
        lag = np.percentile(lags, (2.5, 50, 97.5)) if lags else [0, 0, 0]
        print(
            f"{voice:24} {100 * errors / total:5.1f} % of {total} words; lag {lag[1]:.2f} s, 95 % of words within "
            f"{lag[0]:.2f} to {lag[2]:.2f}",
            flush=True,
        )
        print("\n".join(wrong), flush=True)
    if options.write:
        return
    for name, audio in sounds(rng).items():
        print(f"{name:24} recognized: {''.join(await transcribe(audio)) or 'nothing'}", flush=True)
    prompts = np.concatenate([clip for clip, *_ in clips([options.clips / "prompts.npz"])][::8])
    text = "".join(await transcribe(0.3 * prompts))
    print(f"{'other words (trained)':24} {len(prompts) / RATE:.0f} s recognized: {text}")


if __name__ == "__main__":
    asyncio.run(main())
