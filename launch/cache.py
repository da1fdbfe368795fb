"""This project's folder in the user's cache. Its files can be deleted at any time."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import Stop


def cache_folder() -> Path:
    """Return the folder, and create it if needed. Raises Stop."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "voxtral"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"{folder}: {error.strerror}; set XDG_CACHE_HOME to another folder") from None
    return folder


def place(path: Path, make: Callable[[Path], object]) -> None:
    """Replace `path` atomically by what `make(new_path)` creates: another server may be reading it. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        new = Path(scratch, path.name)
        make(new)
        os.replace(new, path)
