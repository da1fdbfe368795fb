"""Which GPU, and how much memory it has."""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from . import Stop

WSL = "/usr/lib/wsl/lib/nvidia-smi"  # WSL2 has it there, and not always on the PATH
LINE = re.compile(r"(\d+), *(\S+), *(.+), *(.+)")  # index, UUID, free and total MiB, "[N/A]" where RAM is shared
ON_CPU = "CUDA_VISIBLE_DEVICES= ./serve.sh serves without it"


@dataclass(frozen=True)
class Gpu:
    """The first of those to be used. `free` and `total` in MiB, None where GPU and CPU share their memory.

    `visible`: all of them, by index, for CUDA_VISIBLE_DEVICES; empty where that was not set.
    """

    visible: str
    free: int | None
    total: int | None


def find(environment: Mapping[str, str]) -> Gpu | None:
    """The GPU that CUDA_VISIBLE_DEVICES names, by default the first; None where there is none. Raises Stop."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    program = shutil.which("nvidia-smi") or shutil.which(WSL)
    if not program or (wanted is not None and wanted.strip() in ("", "-1")):
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
        raise Stop(f"nvidia-smi finds no GPU: {words or 'it says nothing'}; repair the driver, or {ON_CPU}")
    chosen = [index_of(name.strip(), gpus) for name in (wanted or next(iter(gpus))).split(",")]
    free, total = gpus[chosen[0]].group(3, 4)
    if not (free.isdigit() and total.isdigit()):
        return Gpu(",".join(chosen) if wanted else "", None, None)
    return Gpu(",".join(chosen) if wanted else "", int(free), total_of_cuda(chosen[0], int(total)))


def index_of(name: str, gpus: Mapping[str, re.Match]) -> str:
    """CUDA takes the beginning of a UUID as well. vLLM wants an index."""
    if name.startswith("MIG"):
        raise Stop(f"CUDA_VISIBLE_DEVICES={name}: parts of a GPU (MIG) are not supported: name a whole one", 2)
    found = [index for index, gpu in gpus.items() if name == index or (name[:4] == "GPU-" and gpu[2].startswith(name))]
    if len(found) != 1:
        known = ", ".join(f"{index} ({gpu[2]})" for index, gpu in gpus.items())
        raise Stop(f"CUDA_VISIBLE_DEVICES: {name or 'nothing'} is none of nvidia-smi's GPUs: {known}", 2)
    return found[0]


def total_of_cuda(index: str, total: int) -> int:
    """MiB that vLLM will see: some hundred less than the `total` of nvidia-smi, which counts what the driver keeps.

    Where CUDA cannot be asked, or speaks of another GPU: `total`.
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
