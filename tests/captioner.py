"""stream_microphone.py as a process. Collects its output, or the content of its terminal."""

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pyte
from pulse import Pulse, until

SCRIPT = Path(__file__).parent.parent / "stream_microphone.py"
COLUMNS, LINES = 76, 12


class Captioner:
    """A running stream_microphone.py. `stdout` and `stderr`: its output so far.

    With `terminal=True`, `shown` is the output instead, and `terminal` the screen.
    """

    def __init__(
        self, pulse: Pulse, *arguments: object, terminal: bool = False, environment: dict | None = None, **options
    ):
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        environment = pulse.environment | {"TERM": "xterm-256color", "PYTHONWARNINGS": "error"} | (environment or {})
        options |= {"env": environment, "stdin": subprocess.DEVNULL}
        self.stdout = self.stderr = self.terminal = None
        if terminal:
            self.terminal = pyte.HistoryScreen(COLUMNS, LINES, history=1000)
            self._stream = pyte.ByteStream(self.terminal)
            main, other = pty.openpty()
            fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
            self.process = subprocess.Popen(command, stdout=other, stderr=other, **options)
            os.close(other)
            self._follow("shown", main)
        else:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
            self._follow("stdout", os.dup(self.process.stdout.fileno()))
            self._follow("stderr", os.dup(self.process.stderr.fileno()))
            self.process.stdout.close()
            self.process.stderr.close()

    def _follow(self, name: str, descriptor: int) -> None:
        def read() -> None:
            with contextlib.suppress(OSError):
                while data := os.read(descriptor, 4096):
                    setattr(self, name, getattr(self, name) + data.decode(errors="replace"))
                    if self.terminal:
                        self._stream.feed(data.replace(b"\x1b[2m", b"\x1b[90m"))  # pyte drops dim: bright black
            os.close(descriptor)

        setattr(self, name, "")
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        self._threads = [*getattr(self, "_threads", []), thread]

    def wait_for_recording(self, pulse: Pulse) -> None:
        """Wait until it records. Raises SystemExit with the terminal's text if it ends first."""
        until(lambda: self.process.poll() is not None or pulse.recording(self.process.pid))
        if self.process.poll() is not None:
            self.end()
            raise SystemExit(self.seen())

    @property
    def words(self) -> list[str]:
        return self.stdout.split()

    def said(self, text: str) -> None:
        """Wait until `text` is on stderr."""
        until(lambda: text in self.stderr)

    def heard(self, words: list[str]) -> None:
        """Wait until as many words as `words` has are on stdout."""
        until(lambda: len(self.words) >= len(words))

    def seen(self) -> str:
        """Return the terminal's text, with the lines that have scrolled away."""
        above = ["".join(row[column].data for column in range(COLUMNS)) for row in self.terminal.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.terminal.display]).rstrip()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Wait for its end and return the exit code. Raises AssertionError if it printed a traceback."""
        code = self.process.wait(120)
        for thread in self._threads:
            thread.join(20)
        assert "Traceback" not in (self.stderr or "") + (self.shown if self.terminal else "")
        return code
