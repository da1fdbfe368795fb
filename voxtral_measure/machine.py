"""What a figure depends on besides the server's settings: processor, cards, versions."""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import distributions
from pathlib import Path

PACKAGES = ("vllm", "torch", "bitsandbytes", "vllm-bnb-plugin")
SMI = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")  # the second: in WSL2
CPUINFO = Path("/proc/cpuinfo")


def machine() -> dict:
    """Return processor, cores, cards (name, memory, driver) and installed versions of the machine that runs this.

    If the server runs on another machine, they are not the server's.
    """
    name = re.search(r"^model name\s*: (.+)", CPUINFO.read_text() if CPUINFO.exists() else "", re.MULTILINE)
    return {
        "processor": name[1] if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cards": smi("name,memory.total,driver_version,compute_cap"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {found.name: found.version for found in distributions() if found.name in PACKAGES},
    }


def smi(fields: str) -> list[str]:
    """Return a line of nvidia-smi's `fields` for each card; none without a card."""
    program = next(filter(None, map(shutil.which, SMI)), None)
    if not program:
        return []
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
