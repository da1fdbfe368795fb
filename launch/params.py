"""params.json as vLLM wants it: with `max_position_embeddings`.

The published file calls it `model_max_length`. vLLM then looks for a config.json in Hugging Face's format, which is not
there, four times over: 9 s of a start, and pages of tracebacks in its log. It gets a folder of links to the model's
files, with an edited copy of params.json (`MistralConfigParser` in vllm/transformers_utils/config.py).
"""

import hashlib
import json
from pathlib import Path

from . import Stop
from .cache import cache_folder, place

DEFAULT = 128_000  # vLLM's own, where neither name is there


def served_folder(model: Path) -> Path:
    """Return the folder to serve: `model`, or one of links to its files with a completed params.json. Raises Stop."""
    source = model / "params.json"
    try:
        params = json.loads(source.read_text())
        complete = params.get("max_position_embeddings")
    except (ValueError, AttributeError):
        raise Stop(f"{source}: not a model in Mistral's format; MODEL must be a folder with its three files") from None
    if complete:
        return model
    # One folder for a model, whatever its version: vLLM's cache of compiled code goes by the folder's name.
    folder = cache_folder() / f"model-{hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:12]}"
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.name != "params.json":
            place(folder / file.name, lambda path: path.symlink_to(file.resolve()))  # noqa: B023, it is called at once
    text = json.dumps(params | {"max_position_embeddings": params.get("model_max_length") or DEFAULT})
    place(folder / "params.json", lambda path: path.write_text(text))
    for file in folder.iterdir():
        if not (model / file.name).exists():
            file.unlink()
    return folder
