"""The recipe of the embedded checkpoint (tests/tiny_checkpoint/README.md), run from end to end at small scale."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from servers import ROOT

pytestmark = pytest.mark.slow
EMBEDDED = ROOT / "tests" / "tiny_checkpoint"
# One thread each, so that two runs at once take no longer than one; and the same sums on every machine.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ["--streams", "2", "--frames", "60", "--device", "cpu"]


def start(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, EMBEDDED / script, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen) -> str:
    """Wait for the script to end and return its output."""
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    return output


def tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Names, types and shapes in a checkpoint."""
    data = (folder / "consolidated.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Seven minutes of speech from four of the eight sources: Debian's packages which the tests need anyway."""
    folder = tmp_path_factory.mktemp("recipe") / "clips"
    end(start("make_data.py", folder, "allison", "espeak", "phrases", "flite", "--scale", "0.02"))
    return folder


def test_training(clips, tmp_path):
    runs = [start("train.py", clips, tmp_path / name, "--steps", 20, *SMALL) for name in ("first", "again")]
    output, _ = (end(run) for run in runs)
    losses = re.findall(r"step (\d+), loss (\S+)", output)
    assert [step for step, _ in losses] == ["10", "20"]
    assert float(losses[1][1]) < 0.7 * float(losses[0][1])
    first, again = ((tmp_path / name / "consolidated.safetensors").read_bytes() for name in ("first", "again"))
    assert first == again, "the same command gives other weights"

    options = ["--init", tmp_path / "first", "--rate", 0.1, "--pad-weight", 0.25]
    output = end(start("train.py", clips, tmp_path / "out", *options, "--steps", 10, *SMALL))
    assert float(re.search(r"loss (\S+)", output)[1]) < float(losses[0][1])  # it goes on from the first
    assert "nf4, held out: " in output
    for name in ("params.json", "tekken.json"):
        assert (tmp_path / "out" / name).read_bytes() == (EMBEDDED / name).read_bytes()
    assert tensors(tmp_path / "out") == tensors(EMBEDDED)


def test_an_hour_in_pytorch(clips):
    """Half a minute of it, by the embedded weights: the recipe's model is the one that the server runs."""
    output = end(start("long_session.py", clips, "--minutes", 0.5))
    assert re.fullmatch(r".* min: 0\.00 % of \d\d words wrong", output.splitlines()[-1]), output


def test_sentences_of_held_out_voices(clips, tmp_path):
    end(start("measure.py", clips, "--write", tmp_path / "heldout"))
    rows = (tmp_path / "heldout" / "manifest.csv").read_text().splitlines()
    assert {row.split(",")[2] for row in rows[1:]} == {"flite-rms", "espeak-en-gb-scotland"}
    assert all((tmp_path / "heldout" / row.split(",")[0]).exists() for row in rows[1:])


def test_sample(tmp_path):
    end(start("make_sample.py", tmp_path))
    made, embedded = (soundfile.read(folder / "sample.wav", dtype="int16")[0] for folder in (tmp_path, EMBEDDED))
    np.testing.assert_allclose(made, embedded, rtol=0, atol=1)
    assert (tmp_path / "sample.txt").read_text() == (EMBEDDED / "sample.txt").read_text()
