"""python -m launch MEMORY [options of vllm serve]: every check, then three lines on stdout.

MEMORY is what `nvidia-smi --query-gpu=memory.free,memory.total --format=csv,noheader,nounits` prints
for one GPU, or empty. The settings are the environment variables of serve.sh. Stdout: the folder with
the model's files, the one with the tokenizer if it is another (else an empty line), and MAX_NUM_BATCHED_TOKENS.
"""

import os
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from . import Stop, fit, network
from .delay import checked_delay, tokenizer_with
from .params import served_folder
from .settings import Settings
from .weights import FILES, download


def prepare(memory: str, arguments: list[str]) -> tuple[Path, Path | str, str]:
    """Everything in the order of its cost. Raises Stop."""
    if not find_spec("voxtral_web"):
        raise Stop("vLLM has not the plugins of vllm_plugin/, or old ones: run ./setup.sh")
    settings = Settings(os.environ, arguments)
    delay = checked_delay(settings)
    network.check(settings)
    model = Path(settings["MODEL"])
    if model.is_dir():
        for file in FILES:
            if not (model / file).is_file() or not (model / file).stat().st_size:
                raise Stop(f"{model / file} is missing: MODEL must be a folder with the model's three files")
    elif settings["MODEL"].startswith(("/", ".", "~")) or settings["MODEL"].count("/") != 1:
        raise Stop(f"{model}: no such folder")
    if memory:
        if re.fullmatch(r"\d+, *\d+", memory):  # "[N/A]" where GPU and CPU share their memory
            fit.check(settings, *map(int, memory.split(",")))
    elif "cpu" not in version("vllm"):
        raise Stop(
            "nvidia-smi shows no GPU, but vLLM is installed for one: see that nvidia-smi works, or ./setup.sh --cpu"
        )
    if not model.is_dir():
        model = download(settings["MODEL"], settings["MODEL_REVISION"])
    tokenizer = tokenizer_with(delay, model / "tekken.json") if delay else None
    return served_folder(model), tokenizer or "", settings["MAX_NUM_BATCHED_TOKENS"]


def main(memory: str, *arguments: str) -> int:
    try:
        found = prepare(memory, list(arguments))
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("stopped; a download goes on from there the next time", file=sys.stderr)
        return 130
    print(*found, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
