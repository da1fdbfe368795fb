#!/usr/bin/env python3
"""Run stream_microphone.py for half an hour: does its memory grow, does the text fall behind?

    scripts/soak_microphone.py --url ws://localhost:8000/v1/realtime --minutes 30

A separate PulseAudio plays the speech again and again, as in the tests (Linux; packages: scripts/check). The script
prints a line for each minute (resident memory of the client, lag from its status line) and a line of JSON last. If a
.txt file is beside the audio, its words are compared with the captions.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from captioner import Captioner
from pulse import Pulse, pulseaudio

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "tests" / "tiny_checkpoint" / "sample.wav"


def soak(options: argparse.Namespace, folder: Path, pulse: Pulse) -> dict:
    """Run the client and return the figures."""
    pulse.plug()
    text = folder / "captions.txt"
    captioner = Captioner(pulse, "--url", options.url, "--device", "mic", "--output", text, terminal=True)
    captioner.wait_for_recording(pulse)
    client = captioner.process
    started, rounds, minutes, reported = time.monotonic(), 0, [], 0
    print("minute  memory MiB  lag p50 s  lag p95 s", flush=True)
    playing = pulse.play(options.audio_path)
    while client.poll() is None and time.monotonic() - started < 60 * options.minutes:
        time.sleep(0.2)
        if playing.poll() is not None:
            rounds, playing = rounds + 1, pulse.play(options.audio_path)
        if time.monotonic() - started > 60 * (len(minutes) + 1):
            shown = captioner.shown[reported:]
            reported += len(shown)
            cuts = statistics.quantiles(map(float, re.findall(r"lag (\d+\.\d) s", shown)), n=20)
            memory = psutil.Process(client.pid).memory_info().rss / 2**20
            minutes.append((round(memory, 1), round(cuts[9], 2), round(cuts[18], 2)))
            print(f"{len(minutes):6}  {minutes[-1][0]:10}  {minutes[-1][1]:9}  {minutes[-1][2]:9}", flush=True)
    playing.wait()
    captioner.interrupt()
    code = captioner.end()
    names = ("memory_mib", "lag_p50_s", "lag_p95_s")
    figures = {"minutes": len(minutes), "exit_code": code} | dict(zip(names, zip(*minutes, strict=True), strict=True))
    expected = options.audio_path.with_suffix(".txt")
    if expected.exists():
        spoken, got = expected.read_text().split() * (rounds + 1), text.read_text().split()
        figures |= {"words_spoken": len(spoken), "words_printed": len(got), "all_correct": spoken == got}
    return figures


def main() -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="ws://localhost:8000/v1/realtime")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--audio_path", type=Path, default=SAMPLE, metavar="FILE")
    options = parser.parse_args()
    if options.minutes < 1:
        parser.error("--minutes must be 1 or more")
    if not options.audio_path.is_file():
        parser.error(f"--audio_path {options.audio_path}: no such file")
    with tempfile.TemporaryDirectory(prefix="soak") as folder, pulseaudio() as pulse:
        figures = soak(options, Path(folder), pulse)
    print(json.dumps(figures))
    return figures["exit_code"]


if __name__ == "__main__":
    sys.exit(main())
