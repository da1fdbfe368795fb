"""TRANSCRIPTION_DELAY_MS: how long the model waits before it writes a word.

The delay is in tekken.json (`audio.transcription_delay_ms`, milliseconds). vLLM reads it once, at its start. The
downloaded file does not change: vLLM gets an edited copy with `--tokenizer FOLDER`.
"""

import hashlib
import json
from pathlib import Path

from . import Stop
from .cache import cache_folder, place
from .settings import Settings

DELAYS = [*range(80, 1201, 80), 2400]  # ms; the model was trained for these, according to its card


def checked_delay(settings: Settings) -> int | None:
    """Return the chosen delay in ms, or None for the model's own. Raises Stop."""
    text = settings["TRANSCRIPTION_DELAY_MS"]
    if not text:
        return None
    if text not in map(str, DELAYS):
        raise Stop(f"TRANSCRIPTION_DELAY_MS={text}: the model supports {', '.join(map(str, DELAYS))}", 2)
    if settings["TOKENIZER"]:
        raise Stop("TRANSCRIPTION_DELAY_MS and --tokenizer cannot be used together: leave one of them out", 2)
    return int(text)


def tokenizer_with(delay: int, source: Path) -> Path | None:
    """Return a folder with a copy of the file `source` that has this delay (ms), or None if the file itself has it.

    Raises Stop.
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
    folder = cache_folder() / f"tokenizer-{delay}ms-{hashlib.sha256(original).hexdigest()[:12]}"
    if not (folder / "tekken.json").exists():
        tekken["audio"]["transcription_delay_ms"] = delay
        folder.mkdir(exist_ok=True)
        place(folder / "tekken.json", lambda path: path.write_text(json.dumps(tekken)))
    return folder
