"""Measure an hour in one session, in PyTorch (fp32): are the last five minutes as good as the first?

    python long_session.py CLIPS [--checkpoint FOLDER] [--minutes 60]

The sliding windows, the cache of keys and values, and the positions are those of the server. A server without speed
patches is too slow for an hour in one session.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from measure import RATE, clips_by_voice, utterance
from model import Model, mel_filters
from rapidfuzz.distance import Levenshtein
from safetensors.torch import load_file
from train import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    rng = np.random.default_rng(11)
    model = Model(json.loads((options.checkpoint / "params.json").read_text()))
    model.load_state_dict(load_file(options.checkpoint / "consolidated.safetensors"))
    said = clips_by_voice(options.clips)["allison"]
    words, ends, audio, length = [], [], [], 0
    while length < 60 * options.minutes * RATE:
        some = list(rng.permutation(sorted(said)))
        part, times = utterance(said, some, rng)
        words += some
        ends += [length / RATE + time for time in times]
        audio.append(part.astype(np.float32))
        length += len(part)
    audio = torch.tensor(np.concatenate(audio))
    frames = len(audio) // 1280
    tokens = model.transcribe(audio[None, : frames * 1280], mel_filters(), torch.float32)[0].tolist()
    recognized, times = read(tokens)
    print(f"{len(tokens)} frames, {len(words)} words")
    last = 0.08 * len(tokens) - 1
    for a, b in ((0, 300), (last / 2 - 150, last / 2 + 150), (last - 300, last)):
        part = [word for word, end in zip(words, ends, strict=True) if a <= end < b]
        got = [word for word, time in zip(recognized, times, strict=True) if a <= time - 0.11 < b]
        wrong = 100 * Levenshtein.distance(part, got) / len(part)
        print(f"{a / 60:5.1f} to {b / 60:5.1f} min: {wrong:.2f} % of {len(part)} words wrong")


if __name__ == "__main__":
    main()
