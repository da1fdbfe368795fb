"""TRANSCRIPTION_DELAY_MS: how long the model listens before it speaks of what it heard.

The delay stands in tekken.json (`audio.transcription_delay_ms`, milliseconds) and vLLM reads it once,
when it starts. The downloaded file stays as it is: an edited copy goes to `--tokenizer FOLDER`.
"""

import hashlib
import json
from pathlib import Path

from . import Stop
from .cache import cache_folder, place
from .settings import Settings

DELAYS = [*range(80, 1201, 80), 2400]  # those the model was trained for: the card of the model


def checked_delay(settings: Settings) -> int | None:
    """The wanted delay in ms, or None for the model's own. Raises Stop."""
    text = settings["TRANSCRIPTION_DELAY_MS"]
    if not text:
        return None
    if text not in map(str, DELAYS):
        raise Stop(f"TRANSCRIPTION_DELAY_MS={text}: the model knows {', '.join(map(str, DELAYS))}", 2)
    if settings["TOKENIZER"]:
        raise Stop("TRANSCRIPTION_DELAY_MS makes a tokenizer of its own: leave out one of it and --tokenizer", 2)
    return int(text)


def tokenizer_with(delay: int, source: Path) -> Path | None:
    """A folder with a copy of the file `source` that has this delay, or None if the file has it itself."""
    original = source.read_bytes()
    try:
        tekken = json.loads(original)
        own = tekken["audio"]["transcription_delay_ms"]
    except (ValueError, KeyError, TypeError):
        raise Stop(f"{source} has no transcription_delay_ms: it is no tokenizer of Voxtral Realtime") from None
    if own == delay:
        return None
    # The name holds the source's hash: another model, or another version, gets another copy.
    folder = cache_folder() / f"tokenizer-{delay}ms-{hashlib.sha256(original).hexdigest()[:12]}"
    if not (folder / "tekken.json").exists():
        tekken["audio"]["transcription_delay_ms"] = delay
        folder.mkdir(exist_ok=True)
        place(folder / "tekken.json", lambda path: path.write_text(json.dumps(tekken)))
    return folder
