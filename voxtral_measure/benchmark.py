"""Measure how many live streams the server holds, and how late their words are.

Streams are paced as microphones would. The lag of a frame of 80 ms is the time from sending the audio it
needs to its arrival; the model's own delay (480 ms by default) comes on top.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path

from voxtral_client import UserError
from voxtral_client.cli import Parser, add_server_options, run, seconds, server_from
from voxtral_client.media import AudioFile
from voxtral_client.protocol import FRAME
from voxtral_client.screen import Screen
from voxtral_client.session import Refused, SessionLost

from .figures import find_limit, holds, processes_for, summary, unbroken
from .load import delay_tokens
from .plot import svg

HERE = Path(__file__).resolve().parent.parent  # the folder of both packages
SAMPLE = HERE / "tests" / "tiny_checkpoint" / "sample.wav"
RESERVED = 90  # of a session's tokens: its prompt, and the end that the server adds
SPANS = ("lag_ms", "last_quarter_ms")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with 2 where they make no sense."""
    parser = Parser(__doc__)
    parser.add_argument("audio", nargs="*", metavar="FILE", help="what the streams say (default: the sample)")
    parser.add_argument(
        "--streams", type=numbers, default=[1], metavar="N[,N...]", help="streams at once, in one or several runs"
    )
    parser.add_argument(
        "--duration", type=seconds, default=30.0, metavar="SECONDS", help="of each run (default: %(default).0f)"
    )
    parser.add_argument("--find-limit", action="store_true", help="search for the most streams, from --streams on")
    parser.add_argument(
        "--max-lag",
        type=milliseconds,
        metavar="MS",
        help="with --find-limit: for the last quarter's 95th percentile (default: 200)",
    )
    parser.add_argument("--unpaced", action="store_true", help="send as fast as the server takes it: throughput")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw the last quarter's lag over the number of streams")
    parser.add_argument("--processes", type=int, metavar="N", help="of this client (default: by streams and cores)")
    add_server_options(parser)
    options = parser.parse_args(argv)
    if options.unpaced and (options.find_limit or options.plot):
        parser.error("--unpaced measures throughput: --find-limit and --plot are about lag")
    if options.max_lag is not None and not options.find_limit:
        parser.error("--max-lag goes with --find-limit")
    if options.find_limit and len(options.streams) > 1:
        parser.error("--find-limit starts from one number: --streams N")
    if options.plot and not options.plot.lower().endswith(".svg"):
        parser.error(f"--plot {options.plot}: the picture is an SVG: name it so")
    if options.processes is not None and options.processes < 1:
        parser.error("--processes must be 1 or more")
    if not options.audio and not SAMPLE.exists():
        parser.error("the sample is not installed: give a FILE of audio")
    if options.duration < 4:
        parser.error("--duration must be 4 seconds or more: the last quarter is looked at by itself")
    return options


def numbers(text: str) -> list[int]:
    """Parse numbers of streams."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return found


def milliseconds(text: str) -> float:
    """Parse a positive number of milliseconds."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0 ms")
    return float(text)


class Benchmark:
    """Runs, their table on stdout, remarks on stderr."""

    def __init__(self, options: argparse.Namespace, screen: Screen):
        self.options, self.screen = options, screen
        self.runs: list[dict] = []
        self.model, self.delay = "", 0

    async def open(self) -> None:
        """Ask the server what it is, and make it warm. Raises Refused or SessionLost."""
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
        """Wait until a short session goes through, so that a run does not find the one before still at work."""
        for left in reversed(range(10)):
            try:
                server = server_from(self.options)
                self.delay = await delay_tokens(server, self.model, self.options.give_up_after)
                return
            except SessionLost as error:
                if not error.busy:
                    raise
            if not left:
                raise Refused(
                    "all sessions of the server are taken: stop its other clients, or start it with a larger "
                    "MAX_NUM_SEQS"
                )
            await asyncio.sleep(0.5)

    async def measure(self, streams: int) -> dict:
        """Run `streams` streams, print their row and return their figures."""
        if self.runs:
            await self.settle()
        options, clock = self.options, time.monotonic
        begin = ramp(streams) if not options.unpaced else 0.0
        end = begin + options.duration
        starts = [
            (number, begin * number / streams + number * 0.618034 % 1 * 0.08 if begin else 0.0)
            for number in range(streams)
        ]
        processes = min(streams, options.processes or processes_for(streams, os.cpu_count() or 1))
        job = {
            "server": {name: getattr(options, name) for name in SERVER_OPTIONS},
            "audio": [str(Path(path).resolve()) for path in options.audio or [SAMPLE]],
            "model": self.model,
            "delay_tokens": self.delay,
            "paced": not options.unpaced,
            "end": end,
        }
        jobs = [job | {"streams": starts[number::processes]} for number in range(processes)]
        started = clock()

        async def redraw() -> None:
            while True:
                self.screen.show("", f"{streams} streams: {clock() - started:.0f} s of about {end:.0f}")
                await asyncio.sleep(0.5)

        drawing = asyncio.create_task(redraw())
        try:
            figures = summary(await run_jobs(jobs), streams, begin, end, paced=not options.unpaced)
        finally:
            drawing.cancel()
        self.runs.append(figures)
        self.screen.write(row(figures, options.unpaced, first=len(self.runs) == 1))
        self.remark(figures)
        return figures

    def remark(self, figures: dict) -> None:
        """Say what the figures alone would not tell."""
        streams, client = figures["streams"], figures["client"]
        if busy := figures["busy"]:
            self.screen.say(
                f"the server is full: it took {streams - busy} of {streams} streams; for more start it with a larger "
                "MAX_NUM_SEQS"
            )
        for reason, count in figures["broken"].items():
            self.screen.say(f"{count} of {streams} streams broke off: {reason}")
        if client["is_limit"] and not self.options.unpaced:
            self.screen.say(
                f"with {streams} streams this client was too slow to measure the server: its sends were up to "
                f"{client['late_p95_ms']:.0f} ms late (95 %) and took {100 * client['busiest_core']:.0f} % of a core; "
                "run it on another machine than the server, or with more --processes"
            )


SERVER_OPTIONS = ("url", "api_key", "cafile", "insecure", "give_up_after")


def ramp(streams: int) -> float:
    """Return the seconds over which the streams are started: not all at once, as people do not."""
    return min(5.0, 0.05 * streams) + 0.1


async def run_jobs(jobs: list[dict]) -> list[dict]:
    """Run each job in a process of its own, all from the same moment; return their results."""
    command = [sys.executable, "-m", "voxtral_measure.load"]
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "cwd": HERE}
    # In sessions of their own Ctrl+C does not reach them while they start.
    workers = [await asyncio.create_subprocess_exec(*command, **pipes, start_new_session=True) for _ in jobs]
    try:
        for worker, job in zip(workers, jobs, strict=True):
            worker.stdin.write(json.dumps(job).encode() + b"\n")
        ready = [await worker.stdout.readline() for worker in workers]
        for worker in workers:
            worker.stdin.write(b"go\n")
        output = await asyncio.gather(*(worker.stdout.read() for worker in workers))
        if not all(ready) or not all(output):
            raise Refused("a process of this client ended early; what it said stands above")
        return [json.loads(text) for text in output]
    finally:
        for worker in workers:
            if worker.returncode is None and not worker.stdout.at_eof():
                worker.kill()
            await worker.wait()


def row(figures: dict, unpaced: bool, first: bool) -> str:
    """Return a run's line of the table, the first with the table's head."""
    streams, client = figures["streams"], figures["client"]
    if unpaced:
        speed = figures["times_real_time"]
        head = f"{'streams':>7}  {'x real time':>11}  {'each':>6}\n"
        return (head if first else "") + f"{streams:7}  {speed:11.1f}  {speed / streams:6.1f}\n"
    names = ("p50", "p95", "p99", "max")
    title = "".join(f"{name:>7}" for name in names)
    head = f"{'':7}  {'lag, ms':>28}  {'of the last quarter':>28}  {'client':>6}\n"
    head += f"{'streams':>7}  {title}  {title}  {'core':>6}\n"
    spans = ("".join(f"{(figures[span] or {}).get(name, float('nan')):7.0f}" for name in names) for span in SPANS)
    return (head if first else "") + f"{streams:7}  {'  '.join(spans)}  {100 * client['busiest_core']:4.0f} %\n"


async def limit(benchmark: Benchmark) -> dict:
    """Search for the most streams; return the number and what set it: lag, sessions, breaks or client."""
    max_lag = benchmark.options.max_lag or 200.0
    granted, reasons = 10**9, {}

    async def measure(streams: int) -> bool:
        nonlocal granted
        if streams > granted:
            return False
        figures = await benchmark.measure(streams)
        if figures["busy"]:
            granted = min(granted, streams - figures["busy"])
            reasons[streams] = "MAX_NUM_SEQS"
        elif figures["client"]["is_limit"]:
            reasons[streams] = "client"
        else:
            reasons[streams] = "lag" if unbroken(figures) else "broken streams"
        return holds(figures, max_lag)

    most = await find_limit(measure, benchmark.options.streams[0])
    by = reasons[min(streams for streams in reasons if streams > most)]
    text = {
        "lag": f"the last quarter's p95 is over {max_lag:.0f} ms",
        "MAX_NUM_SEQS": "the server grants no more sessions (start it with a larger MAX_NUM_SEQS)",
        "broken streams": "streams break off",
        "client": "this client is too slow to say what the server can",
    }[by]
    benchmark.screen.write(f"{most} live streams held; with {min(n for n in reasons if n > most)}, {text}\n")
    return {"limit": most, "limited_by": by, "max_lag_ms": max_lag}


async def main_loop(options: argparse.Namespace) -> int:
    """Run what was asked for and return the exit code."""
    for path in options.audio:
        _ = AudioFile(path).seconds  # says at once what is wrong
    if options.plot:
        Path(options.plot).touch()  # says at once if it cannot be written
    found = {}
    with Screen() as screen:
        benchmark = Benchmark(options, screen)
        await benchmark.open()
        if options.find_limit:
            found = await limit(benchmark)
        else:
            for streams in options.streams:
                await benchmark.measure(streams)
        delay = 80 * benchmark.delay
        about = {"model": benchmark.model, "delay_ms": delay, "duration": options.duration}
        if options.plot:
            points = [(run["streams"], run["last_quarter_ms"]) for run in benchmark.runs if run["last_quarter_ms"]]
            if not points:
                raise UserError("no stream lasted to the last quarter: there is nothing to plot")
            title = f"Lag of live captions, {benchmark.model}"
            Path(options.plot).write_text(svg(title, points, found.get("max_lag_ms")))
        screen.write(json.dumps(about | found | {"runs": benchmark.runs}) + "\n")
    return 0 if options.find_limit or all(unbroken(run) for run in benchmark.runs) else 1


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run(main_loop(parse(argv)))
