"""The model's files as vLLM needs them: edited copies in this project's folder of the user's cache.

That folder's files can be deleted at any time.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import Stop
from .settings import Settings

DELAYS = [*range(80, 1201, 80), 2400]  # ms; the model was trained for these, according to its card
LENGTH = 128_000  # vLLM's own `max_position_embeddings`, if params.json has neither name


def cache_folder(name: str = "") -> Path:
    """Return the folder, or its subfolder `name`, and create it if needed. Raises Stop."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "voxtral" / name
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


def checked_delay(settings: Settings) -> int | None:
    """Return TRANSCRIPTION_DELAY_MS, how long the model waits before it writes a word; None: its own. Raises Stop."""
    text = settings["TRANSCRIPTION_DELAY_MS"]
    if not text:
        return None
    if text not in map(str, DELAYS):
        raise Stop(f"TRANSCRIPTION_DELAY_MS={text}: the model supports {', '.join(map(str, DELAYS))}", 2)
    if settings["TOKENIZER"]:
        raise Stop("TRANSCRIPTION_DELAY_MS and --tokenizer cannot be used together: leave one of them out", 2)
    return int(text)


def tokenizer_with(delay: int, source: Path) -> Path | None:
    """Return a folder with a copy of tekken.json, `source`, that has this delay (ms); None if the file itself has it.

    vLLM reads the delay (`audio.transcription_delay_ms`) once, at its start, from --tokenizer FOLDER. Raises Stop.
    """
    original = source.read_bytes()
    try:
        tekken = json.loads(original)
        own = tekken["audio"]["transcription_delay_ms"]
    except (ValueError, KeyError, TypeError):
        raise Stop(f"{source} has no transcription_delay_ms: it is not a tokenizer of Voxtral Realtime") from None
    if own == delay:
        return None
    # The name contains the source's hash, so that each model and version has its own copy.
    folder = cache_folder(f"tokenizer-{delay}ms-{hashlib.sha256(original).hexdigest()[:12]}")
    if not (folder / "tekken.json").exists():
        tekken["audio"]["transcription_delay_ms"] = delay
        place(folder / "tekken.json", lambda path: path.write_text(json.dumps(tekken)))
    return folder


def served_folder(model: Path) -> Path:
    """Return the folder to serve: `model`, or a folder of links to its files and an edited params.json. Raises Stop.

    vLLM needs `max_position_embeddings`, which the published file calls `model_max_length`. Without it vLLM
    searches four times for a config.json in Hugging Face's format, which does not exist: this takes 9 s of a start, and
    fills the log with tracebacks (`MistralConfigParser` in vllm/transformers_utils/config.py).
    """
    source = model / "params.json"
    try:
        params = json.loads(source.read_text())
        complete = params.get("max_position_embeddings")
    except (ValueError, AttributeError):
        raise Stop(f"{source}: not a model in Mistral's format; MODEL must be a folder with its three files") from None
    if complete:
        return model
    # All versions of a model get the same folder, because vLLM's cache of compiled code depends on its name.
    folder = cache_folder(f"model-{hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:12]}")
    for file in model.iterdir():
        if file.name != "params.json":
            place(folder / file.name, lambda path: path.symlink_to(file.resolve()))  # noqa: B023, called immediately
    text = json.dumps(params | {"max_position_embeddings": params.get("model_max_length") or LENGTH})
    place(folder / "params.json", lambda path: path.write_text(text))
    for file in folder.iterdir():
        if not (model / file.name).exists():
            file.unlink()
    return folder
