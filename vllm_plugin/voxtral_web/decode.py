"""Decodes an upload in a process of its own: `python -m voxtral_web.decode`. Another process reads it by `Decoding`.

A file of unknown origin goes through libraries in C. Where it crashes them or takes all memory, only this process ends.
It begins before there is a file, so that a short one does not wait for its imports, and ends with the first one.

Standard input: a line of JSON, [path, name for messages, most hours]. Standard output: a line with the duration in
seconds, 0 if it is unknown, then PCM16, 16 kHz mono. Standard error: why the file cannot be read, or is damaged.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from voxtral_client.errors import AudioError
from voxtral_client.media import AudioFile
from voxtral_client.protocol import RATE

COMMAND = ["nice", "-n", "5", sys.executable, "-Pm", "voxtral_web.decode"]


class Decoding:
    """A file that a process decodes. For voxtral_client.pool it is as an AudioFile; it can be read once."""

    endless = True
    seconds: float | None = None

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)

    def begin(self, path: str, name: str, hours: float) -> None:
        """Name the file."""
        self._name = name
        with suppress(BrokenPipeError):  # `blocks` says that the process has ended
            self.process.stdin.write(json.dumps([path, name, hours]).encode() + b"\n")
            self.process.stdin.flush()

    def blocks(self) -> Iterator[bytes]:
        """Yield the audio. Raises AudioError, at the end where the file is damaged."""
        process = self.process
        self.seconds = float(process.stdout.readline() or 0) or None
        while block := process.stdout.read(RATE):
            yield block
        message = process.stderr.read().decode(errors="replace").strip()
        if process.wait():
            raise AudioError(message.rpartition("\n")[2] or f"{self._name}: the decoder crashed: damaged audio")

    async def end(self) -> None:
        """Kill the process, if it still runs, and wait for its end."""
        self.process.kill()
        await asyncio.to_thread(self.process.communicate)


def main() -> None:
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, this process is killed first
    if not (request := sys.stdin.readline()):
        return  # the server has ended
    path, name, hours = json.loads(request)
    try:
        audio = AudioFile(path)
        audio.name, audio.hours = name, hours
        sys.stdout.buffer.write(b"%f\n" % (audio.seconds or 0))
        for block in audio.blocks():
            sys.stdout.buffer.write(block)
    except AudioError as error:
        sys.exit(str(error).replace(path, name))
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    main()
