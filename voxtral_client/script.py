"""Starts the scripts: in a clone with the packages that setup.sh has installed, whichever Python starts them."""

import os
import signal
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("av", "numpy", "rich", "sounddevice", "soxr", "websockets")


def use_environment() -> None:
    """Begin again with the environment's Python if this one is too old or lacks a package. Exits if there is none.

    Until `interruptible` Ctrl+C ends the process: a KeyboardInterrupt while modules are imported would be a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    lacks = [name for name in PACKAGES if not find_spec(name)] or ["Python 3.11"] * (sys.version_info < (3, 11))
    if not lacks:
        return
    folder = Path(os.environ.get("VOXTRAL_VENV") or Path(__file__).resolve().parent.parent / ".venv")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists() or folder.resolve() == Path(sys.prefix).resolve():
        sys.exit(f"error: {lacks[0]} is not installed: run ./setup.sh, or ./setup.sh --client where no server runs")
    os.execv(python, [str(python), *sys.argv])


def interruptible() -> None:
    """Let Ctrl+C raise KeyboardInterrupt from here on."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def start(module: str) -> None:
    """Exit with what `main` of a module returns."""
    use_environment()
    sys.exit(import_module(module).main())


transcribe = partial(start, "voxtral_client.files")
live = partial(start, "voxtral_client.live")
benchmark = partial(start, "voxtral_measure.benchmark")
evaluate = partial(start, "voxtral_measure.evaluate")
