"""The terminal: transcript on stdout, everything else on stderr, one live line at the bottom."""

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from .session import printable
from .timeline import Word


class Screen:
    """Prints final text, and keeps the partial words and a status line below it.

    On a terminal the text is wrapped at the window's width. A pipe or a file on stdout gets the plain text at once;
    then only the status line is shown, if stderr is a terminal. `quiet`: without the status line.
    """

    def __init__(self, quiet: bool = False):
        self._on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        console = Console(stderr=not self._on_terminal, highlight=False)
        self._live = None
        if self._on_terminal or (sys.stderr.isatty() and not quiet):
            self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._quiet = quiet
        self._line = ""  # final text of the line that is not full yet
        self._partial, self._status = "", Text()

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._partial, self._status = "", Text()
            self._refresh()
            self._live.stop()

    def write(self, text: str) -> None:
        """Print final text as it is: no space or newline is added."""
        if not self._on_terminal:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        console = self._live.console
        *full, rest = Text(self._line + text).wrap(console, max(20, console.width) - 1)
        for line in full:
            console.print(line)
        self._line = rest.plain
        self._refresh()

    @asynccontextmanager
    async def redrawn(self, content: Callable[[], tuple[str, RenderableType]]) -> AsyncIterator[None]:
        """Show what `content()` returns (partial text, status line) five times a second, until the block ends."""

        async def redraw() -> None:
            while True:
                self._partial, self._status = content()
                self._refresh()
                await asyncio.sleep(0.2)

        drawing = asyncio.create_task(redraw())
        try:
            yield
        finally:
            drawing.cancel()

    def say(self, message: str) -> None:
        """Print a message on a line of its own, on stderr."""
        message = printable(message)
        if self._live:
            self._live.console.print(Text(message, style="yellow"))
        else:
            print(message, file=sys.stderr, flush=True)

    def _refresh(self) -> None:
        if not self._live:
            return
        lines = [] if self._quiet else [self._status]
        if self._on_terminal and (self._line or self._partial):
            lines.insert(0, Text.assemble(self._line, (self._partial, "dim")))
        self._live.update(Group(*lines), refresh=True)


class ScreenWriter:
    """The plain transcript on the screen, as subtitles.Writer writes files. A long pause begins a new line.

    `fresh`: nothing is in the line yet. `pause`: seconds between two words.
    """

    def __init__(self, screen: Screen, pause: float = math.inf):
        self._screen, self._pause, self._end, self.fresh = screen, pause, 0.0, True

    def write(self, word: Word) -> None:
        """Print a final word. Raises OSError."""
        if word.start - self._end > self._pause:
            self.close()
        self._screen.write(word.text.lstrip() if self.fresh else word.text)
        self.fresh, self._end = False, word.end

    def close(self, **_: object) -> None:
        """End the line, if anything is in it. Raises OSError."""
        if not self.fresh:
            self._screen.write("\n")
        self.fresh = True
