"""Which GPU, and how much memory it has."""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from . import Stop

WSL = "/usr/lib/wsl/lib/nvidia-smi"  # in WSL2; not always on the PATH
LINE = re.compile(r"(\d+), *(\S+), *(.+), *(.+)")  # index, UUID, free and total MiB; "[N/A]" if memory is shared
ON_CPU = "CUDA_VISIBLE_DEVICES= ./serve.sh uses the CPU"


@dataclass(frozen=True)
class Gpu:
    """The first GPU that will be used. `free` and `total`: MiB, None if GPU and CPU share their memory.

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
    command = [program, "--query-gpu=index,uuid,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        words = " ".join((result.stdout + result.stderr).split())
        code = result.returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        words, code = str(error), 1
    gpus = {match[1]: match for match in map(LINE.fullmatch, result.stdout.splitlines()) if match} if not code else {}
    if not gpus:
        raise Stop(f"nvidia-smi finds no GPU: {words or 'it printed nothing'}; repair the driver, or {ON_CPU}")
    indices = [index_of(name.strip(), gpus) for name in (chosen or next(iter(gpus))).split(",")]
    visible = ",".join(indices) if chosen else ""
    free, total = gpus[indices[0]].group(3, 4)
    if not (free.isdigit() and total.isdigit()):
        return Gpu(visible, None, None)
    return Gpu(visible, int(free), total_of_cuda(indices[0], int(total)))


def index_of(name: str, gpus: Mapping[str, re.Match]) -> str:
    """Return the index of a GPU for vLLM. `name`: an index, or the beginning of a UUID, as CUDA. Raises Stop."""
    if name.startswith("MIG"):
        raise Stop(f"CUDA_VISIBLE_DEVICES={name}: parts of a GPU (MIG) are not supported: name a GPU", 2)
    found = [index for index, gpu in gpus.items() if name == index or (name[:4] == "GPU-" and gpu[2].startswith(name))]
    if len(found) != 1:
        known = ", ".join(f"{index} ({gpu[2]})" for index, gpu in gpus.items())
        raise Stop(f"CUDA_VISIBLE_DEVICES: {name or 'nothing'} is none of nvidia-smi's GPUs: {known}", 2)
    return found[0]


def total_of_cuda(index: str, total: int) -> int:
    """Return the MiB that vLLM will see. That is some hundred less than nvidia-smi's `total`, which the driver shares.

    Return `total` if CUDA gives no answer, or the size of another GPU.
    """
    os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": index}  # as nvidia-smi counts
    device, size = ctypes.c_int(), ctypes.c_size_t()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
        failed = failed or cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    except (OSError, AttributeError):
        return total
    mib = size.value >> 20
    return mib if not failed and 0.8 * total < mib <= total else total
