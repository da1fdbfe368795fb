"""Live streams for a benchmark: audio paced like microphones, and the lag of every frame.

    python -m voxtral_measure.streams        one process of benchmark.py

reads a job (a line of JSON) on stdin, writes "ready", waits for a line, and writes its results as a line of JSON.
A session that breaks is not resumed; it is counted with its reason.

Frame k (from 0) needs audio up to 0.0825 + 0.08 (delay tokens + k) seconds: 0.5625 + 0.08 k at the usual 480 ms
(vLLM 0.32.0, `voxtral_realtime.py`: delay, the frame itself, 2.5 ms of look-ahead). Its lag is the time from sending
the message that completed this audio to the arrival of delta k.
"""

import argparse
import asyncio
import itertools
import json
import math
import signal
import sys
import time
from dataclasses import dataclass, field, replace

from voxtral_client.cli import server_from
from voxtral_client.errors import AudioError
from voxtral_client.media import AudioFile
from voxtral_client.protocol import FRAME, PROMPT_TOKENS, RATE
from voxtral_client.session import Done, Refused, Server, Session, SessionLost

from .openai import INTENT, OpenAISession

CHUNK = FRAME / RATE  # seconds of audio in a message: a frame, so that each delta waits for a message of its own
AUDIO_SECONDS = 300  # of the given files: enough variety, and it fits in memory
AHEAD = 5.0  # seconds of audio in flight without pacing, as in voxtral_client.transcriber
DRAIN_SECONDS = 10.0  # how long to wait for missing deltas after the end of the audio


@dataclass
class Stream:
    """One live stream. Times are in seconds of the event loop's clock.

    `outcome`: "" (no error), "busy" (the server has no free session) or why it broke off.
    """

    start: float
    end: float
    offset: int  # the sample of the audio at which it begins
    paced: bool
    give_up_after: float
    sent: list[float] = field(default_factory=list)  # of each message
    arrived: dict[int, float] = field(default_factory=dict)  # of frames, by number; a dialect tells few of them
    frames: int = 0  # that are transcribed
    late: list[float] = field(default_factory=list)  # of each message: the delay that this process caused
    closed: float = 0.0
    outcome: str = ""

    async def run(self, server: Server, model: str, pcm: bytes) -> None:
        """Stream `pcm` (see `read`) from `start` to `end`, repeatedly. An error of the session becomes the outcome."""
        await asyncio.sleep(self.start - asyncio.get_running_loop().time())
        try:
            async with server.session(model) as session:
                sending = asyncio.create_task(self._send(session, pcm))
                try:
                    await self._receive(session, sending)
                finally:
                    sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)
        except (SessionLost, Refused) as error:
            self.outcome = "busy" if getattr(error, "busy", False) else str(error)
        self.closed = asyncio.get_running_loop().time()

    async def _send(self, session: Session, pcm: bytes) -> None:
        clock = asyncio.get_running_loop().time
        at = 2 * self.offset
        begun = free = clock()
        for number in range(1, max(1, round((self.end - self.start) / CHUNK)) + 1):
            due = begun + number * CHUNK  # when a microphone would have recorded its last sample
            if self.paced:
                await asyncio.sleep(max(0.0, due - clock()))
                # While the server does not accept the previous message, the delay is the server's.
                self.late.append(clock() - max(due, free))
                self.sent.append(due + self.late[-1])
            else:
                while number * CHUNK > self.frames * CHUNK + AHEAD:
                    await asyncio.sleep(0.01)
                self.sent.append(clock())
            await session.send(pcm[at : at + 2 * FRAME])
            at = (at + 2 * FRAME) % (len(pcm) - 2 * FRAME)
            free = clock()
        await session.finish()

    async def _receive(self, session: Session, sending: asyncio.Task) -> None:
        """Record when deltas arrive, until the last one, at most DRAIN_SECONDS after the audio. Raises SessionLost."""
        clock = asyncio.get_running_loop().time
        ended, last = None, self.start
        while True:
            try:
                async with asyncio.timeout(0.5):
                    item = await session.receive()
            except TimeoutError:
                item = None
            if sending.done() and ended is None:
                ended = clock()
            if isinstance(item, Done):
                if ended is None:
                    self.outcome = f"the server ended the session after {self.frames * CHUNK:.0f} s"
                return
            if item is not None:
                self.frames = item if isinstance(item, int) else self.frames + 1
                self.arrived[self.frames - 1] = last = clock()
            elif clock() - last > self.give_up_after:
                raise SessionLost(f"no answer for {self.give_up_after:.0f} s")
            if ended is not None and self.paced and clock() - ended > DRAIN_SECONDS:
                return

    def minutes(self) -> list[float]:
        """Return the milliseconds of a frame in each full minute, where the frames at both its ends were told."""
        ends = [self.arrived.get(frame) for frame in range(0, self.frames, 60 * RATE // FRAME)]
        return [1000 * (b - a) * FRAME / RATE / 60 for a, b in itertools.pairwise(ends) if a and b]

    def lags(self, delay_tokens: int) -> list[tuple[float, float]]:
        """Return for each frame (time at which its audio had been sent, lag), in seconds.

        Frames that never came count with the time until the session's end: without them the figures of a server that
        is far behind would be too good. In a dialect only frames count whose number the server told.
        """
        found, told_all = [], len(self.arrived) == self.frames
        for frame in itertools.count():
            message = math.ceil((0.0825 + 0.08 * (delay_tokens + frame)) / CHUNK - 1e-9) - 1
            if message >= len(self.sent) or (frame >= self.frames and self.outcome):
                return found
            if frame in self.arrived or (frame >= self.frames and told_all):
                lag = self.arrived.get(frame, self.closed) - self.sent[message]
                found.append((self.sent[message], max(0.0, lag)))


async def delay_tokens(server: Server, model: str, give_up_after: float) -> int:
    """Return the model's delay in tokens of 80 ms, from a session with one second of silence.

    Raises Refused, or SessionLost, also after `give_up_after` seconds without an answer.
    """
    server = replace(server, url=server.url.partition("?")[0])  # the server's own protocol counts tokens
    try:
        async with asyncio.timeout(give_up_after), server.session(model) as session:
            await session.send(bytes(2 * RATE))
            await session.finish()
            while not isinstance(item := await session.receive(), Done):
                pass
    except TimeoutError:
        raise SessionLost(f"no answer for {give_up_after:.0f} s") from None
    return item.prompt_tokens - PROMPT_TOKENS


def read(paths: list[str]) -> bytes:
    """Return the audio of the files one after another, PCM16 at 16 kHz, AUDIO_SECONDS at most.

    The first frame is repeated at the end, so that messages can wrap around. Raises AudioError.
    """
    pcm = bytearray()
    for block in itertools.chain.from_iterable(AudioFile(path).blocks() for path in paths):
        pcm += block
        if len(pcm) >= 2 * RATE * AUDIO_SECONDS:
            break
    pcm += bytes(max(0, 2 * FRAME - len(pcm)))
    return bytes(pcm + pcm[: 2 * FRAME])


async def run(job: dict, pcm: bytes) -> dict:
    """Run the streams of a job (see benchmark.py); return what was measured, times relative to the job's start."""
    options = argparse.Namespace(**job["options"])
    server, samples = server_from(options), len(pcm) // 2 - FRAME
    if INTENT in server.url:
        server.session_on = OpenAISession
    begun, cpu = asyncio.get_running_loop().time(), time.process_time()
    shared = {"end": begun + job["end"], "paced": not options.unpaced, "give_up_after": options.give_up_after}
    streams = [
        Stream(begun + start, offset=round(number * 0.618034 % 1 * samples), **shared)
        for number, start in job["streams"]
    ]
    async with asyncio.TaskGroup() as tasks:
        for stream in streams:
            tasks.create_task(stream.run(server, job["model"], pcm))
    return {
        "lags": [(round(at - begun, 4), round(lag, 5)) for s in streams for at, lag in s.lags(job["delay_tokens"])],
        "late": [round(late, 5) for stream in streams for late in stream.late],
        "frames": [stream.frames for stream in streams],
        "minutes": [stream.minutes() for stream in streams],
        "last": max((at for stream in streams for at in stream.arrived.values()), default=begun) - begun,
        "outcomes": [stream.outcome for stream in streams],
        "cpu": time.process_time() - cpu,
        "seconds": asyncio.get_running_loop().time() - begun,
    }


def main() -> None:
    """Run one job from stdin. benchmark.py handles Ctrl+C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = json.loads(sys.stdin.readline())
    try:
        pcm = read(job["options"]["audio"])
    except AudioError as error:
        sys.exit(f"error: {error}")
    print("ready", flush=True)
    if sys.stdin.readline():
        print(json.dumps(asyncio.run(run(job, pcm))))


if __name__ == "__main__":
    main()
