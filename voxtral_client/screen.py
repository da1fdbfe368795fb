"""What a person sees: transcript on stdout, everything else on stderr, one live line at the bottom."""

import sys

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text


class Screen:
    """Prints final text for good and keeps the partial words and a status line below it.

    On a terminal the text is wrapped at the window's width. Where stdout is a pipe or a file it
    gets the plain text at once, and only a status line shows, if stderr is a terminal. `quiet`
    leaves the status line out.
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
        """Print final text; the spaces and newlines in it are all there are."""
        if not self._on_terminal:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        self._line += text
        while "\n" in self._line or cell_len(self._line) >= self._width:
            self._print_line()
        self._refresh()

    def show(self, partial: str = "", status: RenderableType = "") -> None:
        """Replace the partial text and the status line."""
        self._partial, self._status = partial, status
        self._refresh()

    def say(self, message: str) -> None:
        """Tell the user something on a line of its own, on stderr."""
        if self._live:
            self._live.console.print(Text(message, style="yellow"))
        else:
            print(message, file=sys.stderr, flush=True)

    @property
    def _width(self) -> int:
        return max(20, self._live.console.width)

    def _print_line(self) -> None:
        """Move the first line of the final text above the live part."""
        line, newline, rest = self._line.partition("\n")
        if cell_len(line) >= self._width:
            cut = len(line)
            while cut > 1 and cell_len(line[:cut]) >= self._width:
                space = line.rfind(" ", 1, cut)
                cut = space if space > 0 else cut - 1
            line, rest = line[:cut], line[cut:].lstrip(" ") + newline + rest
        self._live.console.print(Text(line))
        self._line = rest

    def _refresh(self) -> None:
        if not self._live:
            return
        lines = [] if self._quiet else [self._status]
        if self._on_terminal and (self._line or self._partial):
            lines.insert(0, Text.assemble(self._line, (self._partial, "dim")))
        self._live.update(Group(*lines), refresh=True)
