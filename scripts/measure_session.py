#!/usr/bin/env python3
"""Measure the time per frame over a long recording: the sample again and again, as fast as the server accepts it.

    scripts/measure_session.py --minutes 44                             as the clients do, with rollover
    scripts/measure_session.py --minutes 44 --rollover-after 100000     one session, as long as the server allows

It prints a line for each minute of audio (mean and median of the milliseconds a frame) and a line of JSON last.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from voxtral_client.audio import stream  # noqa: E402
from voxtral_client.cli import add_server_options, run, seconds, server_from  # noqa: E402
from voxtral_client.media import AudioFile  # noqa: E402
from voxtral_client.protocol import FRAME, RATE  # noqa: E402
from voxtral_client.transcriber import Transcriber  # noqa: E402


async def measure(options: argparse.Namespace) -> int:
    """Print the table and return the exit code."""
    transcriber = Transcriber(server_from(options), model=options.model, rollover_after=options.rollover_after)
    await transcriber.open()
    file = AudioFile(options.audio_path)
    rounds = int(options.minutes * 60 / file.seconds)
    blocks = itertools.chain.from_iterable(file.blocks() for _ in range(rounds))
    minutes: dict[int, list[float]] = {}
    add_delta, last = transcriber.timeline.add_delta, time.perf_counter()

    def timed(text: str) -> None:
        nonlocal last
        now = time.perf_counter()
        add_delta(text)
        minute = transcriber.timeline.transcribed // (60 * RATE)
        if minute and minute not in minutes:
            mean, median = statistics.fmean(minutes[minute - 1]), statistics.median(minutes[minute - 1])
            print(f"minute {minute:3}: {mean:6.1f} ms a frame (median {median:.1f})", flush=True)
        minutes.setdefault(minute, []).append(1000 * (now - last))
        last = now

    transcriber.timeline.add_delta = timed
    with open(options.text or os.devnull, "w") as text:
        async for word in transcriber.words(stream(blocks)):
            print(word.text, end="", file=text, flush=True)
    means = [round(statistics.fmean(took), 2) for _, took in sorted(minutes.items())]
    budget = 1000 * FRAME / RATE
    print(json.dumps({"sessions": transcriber.timeline.session, "ms_per_frame": means, "real_time_ms": budget}))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--audio_path", default=ROOT / "tests" / "tiny_checkpoint" / "sample.wav", metavar="FILE")
    parser.add_argument("--rollover-after", type=seconds, metavar="SECONDS", help="default: as the clients")
    parser.add_argument("--text", type=Path, metavar="FILE", help="keep the transcript, to see that it is right")
    add_server_options(parser)
    return run(measure(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
