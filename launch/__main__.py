"""python -m launch [options of vllm serve]: run all checks, download, then print six lines on stdout.

The settings are serve.sh's environment variables. The lines are:
1. "cpu", or "gpu" with the value for CUDA_VISIBLE_DEVICES if there is one
2. the folder with the model's files
3. the folder with the tokenizer if it is another one, else empty
4. the value for --distributed-executor-backend, or empty
5. the number of sessions at once, of all engines together
6. the number of frames in one step
"""

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from . import Stop, fit, gpu, network
from .delay import checked_delay, tokenizer_with
from .params import served_folder
from .settings import Settings
from .weights import FILES, download


def prepare(arguments: list[str]) -> tuple[object, ...]:
    """Run all checks, the cheapest first. Return the six lines. Raises Stop."""
    if not find_spec("voxtral_web"):
        raise Stop("the plugins of vllm_plugin/ are not installed, or too old: run ./setup.sh")
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
    found, for_cpu = gpu.find(os.environ), "cpu" in version("vllm")
    if found and for_cpu:
        raise Stop(f"nvidia-smi shows a GPU, but vLLM is installed for the CPU: run ./setup.sh (or {gpu.ON_CPU})")
    if not found and not for_cpu:
        raise Stop("no GPU found, but vLLM is installed for one: check that nvidia-smi works, or run ./setup.sh --cpu")
    if found and found.total:
        fit.check(settings, found.free, found.total)
    if not model.is_dir():
        model = download(settings["MODEL"], settings["MODEL_REVISION"])
    tokenizer = tokenizer_with(delay, model / "tekken.json") if delay else None
    device = f"gpu {found.visible}" if found else "cpu"
    slots = settings.number("MAX_NUM_SEQS")
    sessions = settings.engines * int(slots) if slots else settings["MAX_NUM_SEQS"]
    frames = settings["MAX_NUM_BATCHED_TOKENS"]
    return device, served_folder(model), tokenizer or "", settings.executor, sessions, frames


def main(*arguments: str) -> int:
    try:
        lines = prepare(list(arguments))
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("stopped; the next start resumes the download", file=sys.stderr)
        return 130
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
