"""Which GPU, and how much memory it has."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from . import Stop

WSL = "/usr/lib/wsl/lib/nvidia-smi"  # in WSL2; not always on the PATH
# MiB are "[N/A]" if GPU and CPU share their memory. CUDA's total is without what the driver reserves.
FIELDS = "index,uuid,memory.free,memory.total,memory.reserved,compute_cap"
CAPABILITY = 8.0  # vLLM computes in bf16 from it on
ON_CPU = "CUDA_VISIBLE_DEVICES= ./serve.sh uses the CPU"


@dataclass(frozen=True)
class Gpu:
    """The first GPU that will be used. `free` and `total`: MiB as CUDA counts, None if GPU and CPU share their memory.

    `visible`: the indices of all GPUs to use, for CUDA_VISIBLE_DEVICES; empty if that was not set.
    """

    visible: str
    free: int | None
    total: int | None


def find(environment: Mapping[str, str]) -> Gpu | None:
    """Return the GPU that CUDA_VISIBLE_DEVICES names, by default the first; None if there is none. Raises Stop."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    program = shutil.which("nvidia-smi") or shutil.which(WSL)
    if not program or (chosen is not None and chosen.strip() in ("", "-1")):
        return None
    command = [program, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        words = " ".join((result.stdout + result.stderr).split())
        code = result.returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        words, code = str(error), 1
    lines = [line.replace(" ", "").split(",") for line in result.stdout.splitlines()] if not code else []
    gpus = {fields[0]: fields for fields in lines if len(fields) == FIELDS.count(",") + 1}
    if not gpus:
        raise Stop(f"nvidia-smi finds no GPU: {words or 'it printed nothing'}; repair the driver, or {ON_CPU}")
    indices = [index_of(name.strip(), gpus) for name in (chosen or next(iter(gpus))).split(",")]
    visible = ",".join(indices) if chosen else ""
    for index in indices:
        if re.fullmatch(r"\d+\.\d+", found := gpus[index][-1]) and float(found) < CAPABILITY:
            raise Stop(
                f"GPU {index} has compute capability {found}, but the model needs {CAPABILITY} (RTX 30 or newer): "
                f"name another GPU with CUDA_VISIBLE_DEVICES, or {ON_CPU}"
            )
    free, total, reserved = gpus[indices[0]][2:5]
    if not (free.isdigit() and total.isdigit()):
        return Gpu(visible, None, None)
    return Gpu(visible, int(free), int(total) - (int(reserved) if reserved.isdigit() else 0))


def index_of(name: str, gpus: Mapping[str, list[str]]) -> str:
    """Return the index of a GPU for vLLM. `name`: an index, or the beginning of a UUID, as CUDA. Raises Stop."""
    if name.startswith("MIG"):
        raise Stop(f"CUDA_VISIBLE_DEVICES={name}: parts of a GPU (MIG) are not supported: name a GPU", 2)
    found = [index for index, gpu in gpus.items() if name == index or (name[:4] == "GPU-" and gpu[1].startswith(name))]
    if len(found) != 1:
        known = ", ".join(f"{index} ({gpu[1]})" for index, gpu in gpus.items())
        raise Stop(f"CUDA_VISIBLE_DEVICES: {name or 'nothing'} is none of nvidia-smi's GPUs: {known}", 2)
    return found[0]
