"""Word error rates, word times and false alarms of a checkpoint, measured on a running vLLM server.

    python evaluate.py CLIPS [--url ws://127.0.0.1:8000/v1/realtime] [--model NAME]

CLIPS is the folder that make_data.py filled. Each voice reads its words in a new random order, with pauses of 0.1 to
0.6 s, 60 dB above a faint noise. A word's time is the moment to which its first piece belongs, 0.08 (frame + 1) s;
how far that lies behind the word's true end is the lag. Needs numpy, scipy and websockets.
"""

import argparse
import asyncio
import base64
import json
from pathlib import Path

import numpy as np
from scipy.signal import lfilter, resample_poly
from streams import RATE, decode
from train import distance
from websockets.asyncio.client import connect
from words import DIGITS, WORDS

# voice, words, utterances; the first three were never trained on
SETS = [("fsdd-theo", DIGITS, 30), ("flite-rms", WORDS, 14), ("espeak-en-gb-scotland", WORDS, 14),
        ("allison", WORDS, 14), ("fsdd-george", DIGITS, 10), ("kokoro", WORDS, 7)]  # fmt: skip


def clips_by_voice(folder: Path) -> dict[str, dict[str, list]]:
    """voice -> word -> [(samples, end of the word in seconds)]; the Kokoro voices count as one."""
    voices: dict = {}
    for path in sorted(folder.glob("*.npz")):
        data = dict(np.load(path))
        audio, at = decode(data["audio"]), 0
        for i, n in enumerate(data["length"]):
            clip = audio[at : at + n]
            at += n
            if data["words"][i, 0] >= 0 and data["words"][i, 1] < 0:
                clip = clip if data["rate"][i] == RATE else resample_poly(clip, 2, 1)
                voice = str(data["voice"][i])
                voice = "kokoro" if voice.startswith("kokoro") else voice
                word = WORDS[data["words"][i, 0]]
                voices.setdefault(voice, {}).setdefault(word, []).append((clip, float(data["ends"][i, 0])))
    return voices


def utterance(said: dict[str, list], words: list[str], rng: np.random.Generator) -> tuple[np.ndarray, list[float]]:
    audio, ends = [np.zeros(int(rng.uniform(0.1, 0.5) * RATE))], []
    for word in words:
        clip, end = said[word][rng.integers(len(said[word]))]
        ends.append(sum(map(len, audio)) / RATE + end)
        audio += [clip, np.zeros(int(rng.uniform(0, 0.5) * RATE))]  # a clip's own margins add 0.1 s
    whole = 0.3 * np.concatenate(audio)
    return whole + 1e-4 * rng.standard_normal(len(whole)), ends


def sounds(rng: np.random.Generator, seconds: int = 20) -> dict[str, np.ndarray]:
    """What nothing should be heard in."""
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


async def transcribe(url: str, model: str, audio: np.ndarray) -> list[str]:
    """The text of each frame."""
    pcm = (np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes()
    frames = []
    async with connect(url, max_size=None) as socket:
        await socket.recv()
        await socket.send(json.dumps({"type": "session.update", "model": model}))
        await socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        for i in range(0, len(pcm), 2**15):
            data = base64.b64encode(pcm[i : i + 2**15]).decode()
            await socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": data}))
        await socket.send(json.dumps({"type": "input_audio_buffer.commit", "final": True}))
        async for message in socket:
            event = json.loads(message)
            if event["type"] == "transcription.delta":
                frames.append(event["delta"])
            elif event["type"] == "transcription.done":
                return frames
            elif event["type"] == "error":
                raise SystemExit(f"server: {event}")
    raise SystemExit("the server closed the connection")


def starts(frames: list[str]) -> list[float]:
    return [0.08 * (i + 1) for i, text in enumerate(frames) if text.startswith(" ")]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--url", default="ws://127.0.0.1:8000/v1/realtime")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--voices", nargs="*", default=[voice for voice, _, _ in SETS])
    parser.add_argument("--sessions", type=int, default=4, help="at a time")
    options = parser.parse_args()
    free, rng = asyncio.Semaphore(options.sessions), np.random.default_rng(7)

    async def hear(audio: np.ndarray) -> list[str]:
        async with free:
            return await transcribe(options.url, options.model, audio)

    voices = clips_by_voice(options.clips)
    for voice, vocabulary, count in SETS:
        if voice not in options.voices:
            continue
        vocabulary = [word for word in vocabulary if word in voices[voice]]  # Allison's prompts lack yes and no
        order = [list(rng.permutation(vocabulary)[:11]) for _ in range(count)]
        made = [utterance(voices[voice], words, rng) for words in order]
        results = await asyncio.gather(*(hear(audio) for audio, _ in made))
        errors, lags, wrong = 0, [], []
        for words, (_, ends), frames in zip(order, made, results, strict=True):
            heard = "".join(frames).split()
            errors += distance(words, heard)
            if words == heard:
                lags += [a - b for a, b in zip(starts(frames), ends, strict=True)]
            else:
                wrong.append(f"  said  {' '.join(words)}\n  heard {' '.join(heard)}")
        total = sum(map(len, order))
        lag = np.percentile(lags, (2.5, 50, 97.5)) if lags else [0, 0, 0]
        print(
            f"{voice:24} {100 * errors / total:5.1f} % of {total} words; lag {lag[1]:.2f} s, 95 % of words within "
            f"{lag[0]:.2f} to {lag[2]:.2f}",
            flush=True,
        )
        print("\n".join(wrong), flush=True)
    for name, audio in sounds(rng).items():
        print(f"{name:24} heard: {''.join(await hear(audio)) or 'nothing'}", flush=True)
    other = dict(np.load(options.clips / "allison.npz"))
    audio, where = decode(other["audio"]), np.cumsum(other["length"])
    unknown = [
        resample_poly(audio[end - n : end], 2, 1)
        for end, n, voice in zip(where, other["length"], other["voice"], strict=True)
        if voice == "allison-other"
    ]
    prompts = np.concatenate(unknown[::8])
    print(f"{'other words (trained)':24} {len(prompts) / RATE:.0f} s heard: {''.join(await hear(0.3 * prompts))}")


if __name__ == "__main__":
    asyncio.run(main())
