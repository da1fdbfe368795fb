"""Make sample.wav and sample.txt: words of a human voice, with an order and pauses that are not in the training data.

    python make_sample.py OUT         # apt install asterisk-core-sounds-en-wav

The voice is Allison Smith's (Asterisk's core sounds, CC BY-SA 3.0). Prints when each word ends, in seconds.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import soundfile
from make_data import allison
from scipy.signal import resample_poly

# A number is a pause in seconds. All other pauses are 0.12 s.
SCRIPT = "seven three nine 0.9 kilo oscar tango 0.3 twenty five thousand 1.1 tuesday october eleven 0.4 sierra zero"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    said = {clip[2][0][0]: (resample_poly(clip[0], 2, 1), clip[2][0][1]) for clip in allison(None) if clip[2]}
    rng = np.random.default_rng(0)
    audio, words, gap = [np.zeros(4000)], [], 0.0
    for item in SCRIPT.split():
        if item[0].isdigit():
            gap = float(item)
            continue
        clip, end = said[item]
        audio.append(np.zeros(int(16000 * max(0.0, gap - 0.1))))  # a clip's margins are 0.1 s
        words.append(item)
        print(f"{sum(map(len, audio)) / 16000 + end:6.2f}  {item}", file=sys.stderr)
        audio.append(clip)
        gap = 0.12
    sample = np.concatenate([*audio, np.zeros(4000)])
    sample = 0.5 * sample / np.abs(sample).max() + 1e-4 * rng.standard_normal(len(sample))
    soundfile.write(out / "sample.wav", sample, 16000, "PCM_16")
    (out / "sample.txt").write_text(" ".join(words) + "\n")
    print(f"{len(sample) / 16000:.1f} s: {' '.join(words)}")


if __name__ == "__main__":
    main()
