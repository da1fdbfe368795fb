"""The commands that `pip install .` gives, and options that people know from Whisper and sounddevice."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib

import pytest
import srt
from servers import CHECKPOINT, ROOT, run_script

import voxtral_client
from voxtral_client.script import PACKAGES

SAMPLE = CHECKPOINT / "sample.wav"
NOT_INSTALLED = "error: av is not installed: run ./setup.sh, or ./setup.sh --client where no server runs\n"
SCRIPTS = ("test_file_transcribe.py", "stream_microphone.py", "benchmark.py", "evaluate.py", "scripts/report")
COMMANDS = ("transcribe", "live", "benchmark", "evaluate")


@pytest.mark.slow  # pip builds the package
def test_installed_commands(tmp_path):
    """They run from an empty folder, with nothing of the clone in reach."""
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in ("voxtral_client", "voxtral_measure"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "requirements-client.txt", "requirements-evaluate.txt"):
        shutil.copy(ROOT / name, source)
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    subprocess.run([*install, "--target", site, source], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    for name in COMMANDS:
        command = [sys.executable, site / "bin" / f"voxtral-{name}", "--version"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert (result.returncode, result.stdout) == (0, f"{voxtral_client.__version__}\n"), result.stderr
    command = [sys.executable, site / "bin" / "voxtral-benchmark"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr.splitlines()[-1].partition("error: ")[2]) == (
        2,
        "the sample is not installed: give a FILE of audio",
    )


def test_any_python_starts_the_scripts(tmp_path):
    """The system's, which has none of the packages: it finds those of setup.sh, or says what to run."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    for script in SCRIPTS:
        command = [tmp_path / "bin" / "python", ROOT / script, "--version"]
        for there, code, answer in (sys.prefix, 0, f"{voxtral_client.__version__}\n"), (tmp_path, 1, NOT_INSTALLED):
            environment = os.environ | {"VOXTRAL_VENV": str(there)}
            result = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert (result.returncode, result.stdout + result.stderr) == (code, answer)


INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "numpy":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupt_before_anything_has_begun(script, tmp_path):
    """Ctrl+C while modules are imported, which takes a second: no traceback, nothing to read."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    result = run_script(script, "--version", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stdout + result.stderr) == (-signal.SIGINT, "")


def test_all_packages_are_looked_for():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert tuple(re.match(r"\w+", name)[0] for name in dependencies) == PACKAGES


@pytest.mark.parametrize("option", ["--max_line_width", "--max-line-width"])
def test_nonsense_for_a_subtitle(option):
    result = run_script("test_file_transcribe.py", SAMPLE, option, 0)
    assert (result.returncode, result.stderr.splitlines()[-1].partition("error: ")[2]) == (
        2,
        "argument --max_line_width: must be 1 or more, not 0",
    )


def test_all_formats_and_the_size_of_subtitles(server, tmp_path):
    size = ["--max-line-width=12", "--max_line_count", 1]
    options = ["--url", server.url, "--format", "all", "--output", f"{tmp_path}/", *size]
    result = run_script("test_file_transcribe.py", "--audio-path", SAMPLE, *options)
    assert result.returncode == 0, result.stderr
    assert {path.suffix for path in tmp_path.iterdir()} == {".txt", ".srt", ".vtt", ".tsv", ".json", ".jsonl"}
    cues = list(srt.parse((tmp_path / "sample.srt").read_text(), ignore_errors=False))
    assert max(len(cue.content) for cue in cues) <= 12
    head, *rows = (line.split("\t") for line in (tmp_path / "sample.tsv").read_text().splitlines())
    assert head == ["start", "end", "text"]
    assert [row[2] for row in rows] == [cue.content for cue in cues]
    times = [(round(cue.start.total_seconds() * 1000), round(cue.end.total_seconds() * 1000)) for cue in cues]
    assert [(int(start), int(end)) for start, end, _ in rows] == times


def test_the_microphone_names_the_formats():
    result = run_script("stream_microphone.py", "-o", "talk.mp3")
    assert (result.returncode, result.stdout) == (2, "")
    assert "cannot tell the format" in result.stderr


def test_python_in_the_readme(server):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    code = code.replace("ws://localhost:8000/v1/realtime", server.url)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert [line.split()[2] for line in result.stdout.splitlines()] == (CHECKPOINT / "sample.txt").read_text().split()
