"""A sound system without hardware: a separate PulseAudio in a temporary folder."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Pulse:
    """A PulseAudio daemon with a loudspeaker `speaker` and, after `plug`, a microphone that records its signal.

    `environment`: for programs that should have only these devices.
    """

    def __init__(self, folder: Path):
        self.environment = os.environ | {
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
            "PULSE_SERVER": f"unix:{folder}/native",
            "JACK_NO_START_SERVER": "1",
            "JACK_DEFAULT_SERVER": "none",
        }
        self._log = (folder / "log").open("w")
        self._daemons: list[subprocess.Popen] = []
        module = f"module-native-protocol-unix socket={folder}/native auth-anonymous=1"
        self.start("pulseaudio", "-n", "--daemonize=no", "--use-pid-file=no", "--exit-idle-time=-1", "-L", module)

    def start(self, *command: str) -> None:
        """Start a daemon of the sound system; `stop` ends it."""
        files = {"stdin": subprocess.DEVNULL, "stdout": self._log, "stderr": self._log}
        self._daemons.append(subprocess.Popen(command, env=self.environment, **files))
        until(lambda: self.control("info", check=False))

    def control(self, *command: str, check: bool = True) -> str:
        """Run pactl and return its output. Raises AssertionError if it fails and `check` is true."""
        result = subprocess.run(["pactl", *command], env=self.environment, capture_output=True, text=True, timeout=20)
        assert not check or result.returncode == 0, result.stderr
        return result.stdout.strip()

    def plug(self, name: str = "mic") -> None:
        """Plug in a microphone."""
        self.control("load-module", "module-remap-source", "master=speaker.monitor", f"source_name={name}")

    def unplug(self) -> None:
        """Unplug the microphone, if there is one."""
        if "module-remap-source" in self.control("list", "short", "modules"):
            self.control("unload-module", "module-remap-source")

    def recording(self, pid: int) -> bool:
        """Return whether the process `pid` records."""
        streams = self.control("list", "source-outputs").split("Source Output #")
        return any("Corked: no" in s and f'application.process.id = "{pid}"' in s for s in streams)

    def play(self, path: Path, speaker: str = "speaker") -> subprocess.Popen:
        """Play a file. The process ends with the sound."""
        return subprocess.Popen(["paplay", f"--device={speaker}", str(path)], env=self.environment)

    def stop(self) -> None:
        """Stop all daemons. JACK is last: while it has a client, it keeps its entry, one of eight, in /dev/shm."""
        for daemon in self._daemons:
            daemon.terminate()
            daemon.wait(20)
        self._log.close()


@contextmanager
def pulseaudio() -> Iterator[Pulse]:
    """Yield a Pulse with its loudspeaker. The path of its folder is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="pulse") as folder:
        pulse = Pulse(Path(folder))
        try:
            # Without norewinds the first second of a sound is lost.
            pulse.control(*"load-module module-null-sink sink_name=speaker norewinds=1 rate=44100 channels=2".split())
            yield pulse
        finally:
            pulse.stop()


def until(condition, seconds: float = 120) -> None:
    """Wait until `condition()` is true. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition is still false after {seconds:g} s"
        time.sleep(0.05)
