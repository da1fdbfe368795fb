"""Measure how many live streams the server holds, and how late their words are.

Streams are paced like microphones. The lag of a frame of 80 ms is the time from sending the audio that it needs to
its arrival. The model's own delay (480 ms by default) is not included.

With --url ws://HOST:8000/v1/realtime?intent=transcription the streams speak OpenAI's protocol: one frame a second
counts.
"""

import argparse
import asyncio
import json
import math
import os
import sys
import time
from pathlib import Path

from voxtral_client.cli import Parser, add_server_options, count, positive, run, server_from
from voxtral_client.media import AudioFile
from voxtral_client.protocol import FRAME, PROMPT_RESERVE
from voxtral_client.screen import Screen
from voxtral_client.session import Refused, SessionLost

from .figures import find_limit, holds, summary, unbroken
from .machine import machine
from .streams import delay_tokens

HERE = Path(__file__).resolve().parent.parent  # the folder of both packages
SAMPLE = HERE / "tests" / "tiny_checkpoint" / "sample.wav"
RESERVED = PROMPT_RESERVE + 10  # of a session's tokens: its prompt, and the end that the server adds
STREAMS_PER_PROCESS = 32  # a quarter of a core (measured: 7 ms for each second of a stream)
MORE_SESSIONS = "start it with a larger MAX_NUM_SEQS"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with 2 for wrong usage."""
    parser = Parser(__doc__)
    parser.add_argument("audio", nargs="*", metavar="FILE", help="audio of the streams (default: the sample)")
    parser.add_argument(
        "--streams", type=counts, default=[1], metavar="N[,N...]", help="streams at once, in one or several runs"
    )
    parser.add_argument(
        "--duration", type=positive, default=30.0, metavar="SECONDS", help="length of each run (default: %(default).0f)"
    )
    parser.add_argument("--find-limit", action="store_true", help="search for the most streams, from --streams on")
    parser.add_argument(
        "--max-lag",
        type=positive,
        metavar="MS",
        help="with --find-limit: limit of the last quarter's 95th percentile (default: 200)",
    )
    parser.add_argument("--unpaced", action="store_true", help="send as fast as the server accepts it: throughput")
    add_server_options(parser)
    options = parser.parse_args(argv)
    if options.unpaced and options.find_limit:
        parser.error("--unpaced measures throughput: --find-limit is about lag")
    if options.max_lag is not None and not options.find_limit:
        parser.error("--max-lag goes with --find-limit")
    if options.find_limit and len(options.streams) > 1:
        parser.error("--find-limit starts from one number: --streams N")
    if not options.audio and not SAMPLE.exists():
        parser.error("the sample is not installed: give a FILE of audio")
    if options.duration < 4:
        parser.error("--duration must be 4 seconds or more: the last quarter has figures of its own")
    options.audio = options.audio or [str(SAMPLE)]
    return options


def counts(text: str) -> list[int]:
    """Parse numbers of streams. Raises ArgumentTypeError or ValueError."""
    return [count(part) for part in text.split(",")]


class Benchmark:
    """Runs, with their table on stdout and remarks on stderr. `delay`: the model's, in tokens of 80 ms."""

    def __init__(self, options: argparse.Namespace, screen: Screen):
        self.options, self.screen = options, screen
        self.runs: list[dict] = []
        self.model, self.delay = "", 0

    async def open(self) -> None:
        """Ask the server for its model, and let it warm up. Raises Refused or SessionLost."""
        server, options = server_from(self.options), self.options
        model = await server.model(options.model)
        self.model, tokens = model["id"], model["max_model_len"]
        longest = int((tokens - RESERVED) * FRAME / 16_000 - ramp(max(options.streams))) if tokens else 10**9
        if options.duration > longest:
            raise Refused(
                f"--duration {options.duration:.0f}: a session of this server ends after {longest} s; give less, or "
                "start it with a larger MAX_MODEL_LEN"
            )
        await self.settle()

    async def settle(self) -> None:
        """Wait until the server accepts a short session: it may still be working on the run before.

        Raises Refused where all sessions stay taken, or as a session.
        """
        for _ in range(10):
            try:
                server = server_from(self.options)
                self.delay = await delay_tokens(server, self.model, self.options.give_up_after)
                return
            except SessionLost as error:
                if not error.busy:
                    raise
            await asyncio.sleep(0.5)
        raise Refused(f"all sessions of the server are taken: stop its other clients, or {MORE_SESSIONS}")

    async def measure(self, streams: int) -> dict:
        """Run `streams` streams, print their row and return their figures (see `summary`). Raises Refused."""
        if self.runs:
            await self.settle()
        options = self.options
        begin = ramp(streams) if not options.unpaced else 0.0
        end = begin + options.duration
        starts = [
            (number, begin * number / streams + number * 0.618034 % 1 * 0.08 if begin else 0.0)
            for number in range(streams)
        ]
        processes = max(1, min((os.cpu_count() or 1) - 1, math.ceil(streams / STREAMS_PER_PROCESS)))
        job = {"options": vars(options), "model": self.model, "delay_tokens": self.delay, "end": end}
        jobs = [job | {"streams": starts[number::processes]} for number in range(processes)]
        started = time.monotonic()

        def status() -> tuple[str, str]:
            return "", f"{streams} streams: {time.monotonic() - started:.0f} s of about {end:.0f}"

        async with self.screen.redrawn(status):
            figures = summary(await run_jobs(jobs), streams, begin, end, paced=not options.unpaced)
        self.runs.append(figures)
        self.screen.write(row(figures, options.unpaced, first=len(self.runs) == 1))
        self.remark(figures)
        return figures

    def remark(self, figures: dict) -> None:
        """Report what the figures do not show: refused and broken streams, a client that is too slow."""
        streams, client = figures["streams"], figures["client"]
        if busy := figures["busy"]:
            taken = f"the server is full: it took {streams - busy} of {streams} streams"
            self.screen.say(f"{taken}; for more {MORE_SESSIONS}")
        for reason, broken in figures["broken"].items():
            self.screen.say(f"{broken} of {streams} streams broke off: {reason}")
        if client["is_limit"] and not self.options.unpaced:
            self.screen.say(
                f"with {streams} streams this client was too slow to measure the server: its sends were up to "
                f"{client['late_p95_ms']:.0f} ms late (95 %) and took {100 * client['busiest_core']:.0f} % of a core; "
                "run it on another machine than the server"
            )


def ramp(streams: int) -> float:
    """Return the time in seconds over which the streams are started: people do not start all at once."""
    return min(5.0, 0.05 * streams) + 0.1


async def run_jobs(jobs: list[dict]) -> list[dict]:
    """Run each job in its own process, all from the same moment; return their results. Raises Refused."""
    command = [sys.executable, "-m", "voxtral_measure.streams"]
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    pipes |= {"env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}}  # a clone is not installed
    # In sessions of their own Ctrl+C does not reach them while they start.
    workers = [await asyncio.create_subprocess_exec(*command, **pipes, start_new_session=True) for _ in jobs]
    try:
        for worker, job in zip(workers, jobs, strict=True):
            worker.stdin.write(json.dumps(job).encode() + b"\n")
        for worker in workers:
            await worker.stdout.readline()  # it is ready: it has started and read the audio
        output = await asyncio.gather(*(worker.communicate(b"go\n") for worker in workers))
    finally:
        for worker in workers:
            if worker.returncode is None:
                worker.kill()
            await worker.wait()
    if any(worker.returncode for worker in workers):
        raise Refused("a process of this client ended early; see its message above")
    return [json.loads(text) for text, _ in output]


def row(figures: dict, unpaced: bool, first: bool) -> str:
    """Return a run's line of the table; the first includes the table's head."""
    streams, client = figures["streams"], figures["client"]
    if unpaced:
        speed = figures["times_real_time"]
        head = f"{'streams':>7}  {'x real time':>11}  {'each':>6}\n"
        return (head if first else "") + f"{streams:7}  {speed:11.1f}  {speed / streams:6.1f}\n"
    names = ("p50", "p95", "p99", "max")
    title = "".join(f"{name:>7}" for name in names)
    head = f"{'':7}  {'lag, ms':>28}  {'of the last quarter':>28}  {'client':>6}\n"
    head += f"{'streams':>7}  {title}  {title}  {'core':>6}\n"
    spans = (figures[span] or dict.fromkeys(names, math.nan) for span in ("lag_ms", "last_quarter_ms"))
    lags = "  ".join("".join(f"{span[name]:7.0f}" for name in names) for span in spans)
    return (head if first else "") + f"{streams:7}  {lags}  {100 * client['busiest_core']:4.0f} %\n"


async def limit(benchmark: Benchmark) -> dict:
    """Search for the most streams; return {"limit", "limited_by", "max_lag_ms"}. Raises as `Benchmark.measure`."""
    max_lag = benchmark.options.max_lag or 200.0
    granted, reasons = 10**9, {}  # sessions of the server; why each number of streams failed

    async def measure(streams: int) -> bool:
        nonlocal granted
        if streams > granted:
            return False
        figures = await benchmark.measure(streams)
        if holds(figures, max_lag):
            return True
        reasons[streams] = "lag" if unbroken(figures) else "broken streams"
        if figures["busy"]:
            granted, reasons[streams] = streams - figures["busy"], "MAX_NUM_SEQS"
        elif figures["client"]["is_limit"]:
            reasons[streams] = "client"
        return False

    most = await find_limit(measure, benchmark.options.streams[0])
    failed = min(reasons)
    text = {
        "lag": f"the last quarter's p95 is over {max_lag:.0f} ms",
        "MAX_NUM_SEQS": f"the server grants no more sessions ({MORE_SESSIONS})",
        "broken streams": "streams break off",
        "client": "this client is too slow to measure the server",
    }
    benchmark.screen.write(f"{most} live streams held; with {failed}, {text[reasons[failed]]}\n")
    return {"limit": most, "limited_by": reasons[failed], "max_lag_ms": max_lag}


async def main_loop(options: argparse.Namespace) -> int:
    """Run the benchmark and return the exit code."""
    for path in options.audio:
        _ = AudioFile(path).seconds  # reports at once what is wrong
    found = {}
    with Screen() as screen:
        benchmark = Benchmark(options, screen)
        await benchmark.open()
        if options.find_limit:
            found = await limit(benchmark)
        else:
            for streams in options.streams:
                await benchmark.measure(streams)
        about = {"model": benchmark.model, "delay_ms": 80 * benchmark.delay, "duration": options.duration}
        screen.write(json.dumps(about | found | {"machine": machine(), "runs": benchmark.runs}) + "\n")
    return 0 if options.find_limit or all(unbroken(run) for run in benchmark.runs) else 1


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run(main_loop(parse(argv)))
