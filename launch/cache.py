"""Our own folder in the user's cache: what can be made again at any time."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import Stop


def cache_folder() -> Path:
    """Return the folder, which exists then. Raises Stop."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "voxtral"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"{folder}: {error.strerror}; XDG_CACHE_HOME names another place") from None
    return folder


def place(path: Path, make: Callable[[Path], object]) -> None:
    """Put what `make(path)` makes in the place of `path`, at once: another server may be reading."""
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        new = Path(scratch, path.name)
        make(new)
        os.replace(new, path)
