"""params.json with `max_position_embeddings`, which vLLM needs.

The published file has it under the name `model_max_length`. vLLM then searches four times for a config.json in Hugging
Face's format, which does not exist: this takes 9 s of a start, and fills the log with tracebacks. Instead, vLLM gets a
folder of links to the model's files, with an edited copy of params.json (`MistralConfigParser` in
vllm/transformers_utils/config.py).
"""

import hashlib
import json
from pathlib import Path

from . import Stop
from .cache import cache_folder, place

DEFAULT = 128_000  # vLLM's own, if the file has neither name


def served_folder(model: Path) -> Path:
    """Return the folder to serve: `model`, or a folder of links to its files and an edited params.json. Raises Stop."""
    source = model / "params.json"
    try:
        params = json.loads(source.read_text())
        complete = params.get("max_position_embeddings")
    except (ValueError, AttributeError):
        raise Stop(f"{source}: not a model in Mistral's format; MODEL must be a folder with its three files") from None
    if complete:
        return model
    # All versions of a model get the same folder, because vLLM's cache of compiled code depends on its name.
    folder = cache_folder() / f"model-{hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:12]}"
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.name != "params.json":
            place(folder / file.name, lambda path: path.symlink_to(file.resolve()))  # noqa: B023, called immediately
    text = json.dumps(params | {"max_position_embeddings": params.get("model_max_length") or DEFAULT})
    place(folder / "params.json", lambda path: path.write_text(text))
    for file in folder.iterdir():
        if not (model / file.name).exists():
            file.unlink()
    return folder
