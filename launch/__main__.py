"""python -m launch [options of vllm serve]: run all checks, download, then print assignments for bash's eval.

Those in capitals are serve.sh's environment variables with the values in force, and are exported. The others:
device: cpu or gpu. model: the folder with the model's files. tokenizer: the folder with it if it is another one.
executor: for --distributed-executor-backend, or empty. sessions: at once, of all engines together.
servers: the number of API processes; 0: as on the command line.
"""

import os
import shlex
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from . import Stop, fit, gpu, network
from .files import checked_delay, served_folder, tokenizer_with
from .settings import TABLE, Settings
from .weights import FILES, download


def prepare(arguments: list[str]) -> dict[str, object]:
    """Run all checks, the cheapest first. Return what to print. Raises Stop."""
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
    values = {setting.name: settings[setting.name] for setting in TABLE}
    del values["CUDA_VISIBLE_DEVICES"]  # set to nothing it means something else
    if found and found.visible:
        values["CUDA_VISIBLE_DEVICES"] = found.visible  # vLLM needs indices, not UUIDs
    slots = settings.number("MAX_NUM_SEQS")
    return values | {
        "device": "gpu" if found else "cpu",
        "model": served_folder(model),
        "tokenizer": tokenizer or "",
        "executor": settings.executor,
        "sessions": settings.engines * int(slots) if slots else settings["MAX_NUM_SEQS"],
        "servers": settings.api_servers(len(os.sched_getaffinity(0))) if found else 0,
    }


def main(*arguments: str) -> int:
    try:
        values = prepare(list(arguments))
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("stopped; the next start resumes the download", file=sys.stderr)
        return 130
    for name, value in values.items():
        print("export " * name.isupper() + f"{name}={shlex.quote(str(value))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
