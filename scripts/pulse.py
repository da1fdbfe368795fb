"""A sound system without hardware: PulseAudio (and JACK) of its own, in a private folder."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Pulse:
    """A PulseAudio daemon with a loudspeaker `room` and, once plugged in, a microphone `mic` that hears it.

    `environment` is that of a program that shall see these devices and no others.
    """

    def __init__(self, folder: Path):
        self.socket = f"unix:{folder}/native"
        self.environment = os.environ | {
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
            "PULSE_SERVER": self.socket,
            "JACK_NO_START_SERVER": "1",
            "JACK_DEFAULT_SERVER": "nobody",
        }
        self._log = (folder / "log").open("w")
        self._daemons: list[subprocess.Popen] = []
        self._spawn("pulseaudio", "-n", "--daemonize=no", "--use-pid-file=no", "--exit-idle-time=-1")

    def _spawn(self, *command: str) -> None:
        if command[0] == "pulseaudio":
            command += ("-L", f"module-native-protocol-unix socket={self.socket[5:]} auth-anonymous=1")
        self._daemons.append(
            subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
            )
        )
        until(lambda: self.control("info", check=False))

    def control(self, *command: str, check: bool = True) -> str:
        """Run pactl and return what it says."""
        result = subprocess.run(["pactl", *command], env=self.environment, capture_output=True, text=True, timeout=20)
        assert not check or result.returncode == 0, result.stderr
        return result.stdout.strip()

    def speaker(self, name: str = "room") -> None:
        """Add a loudspeaker that takes 44.1 kHz stereo; its monitor hears what is played."""
        # norewinds: else the first second of a sound is lost
        sink = f"sink_name={name}", "norewinds=1", "rate=44100", "channels=2"
        self.control("load-module", "module-null-sink", *sink)

    def plug(self, name: str = "mic", speaker: str = "room") -> None:
        """Plug in a microphone."""
        self._mic = self.control(
            "load-module", "module-remap-source", f"master={speaker}.monitor", f"source_name={name}"
        )

    def unplug(self) -> None:
        """Unplug the microphone, if there is one."""
        if "module-remap-source" in self.control("list", "short", "modules"):
            self.control("unload-module", "module-remap-source")

    def jack(self) -> None:
        """Start JACK at 44.1 kHz, with a loudspeaker `jack` whose signal is an input device of two channels.

        No other rate is offered: JACK, unlike PulseAudio, does not resample. Its name is always the same: so it takes
        over the place that a killed run may have left.
        """
        name = "voxtral-tests"
        self.environment["JACK_DEFAULT_SERVER"] = name
        rate = "--rate", "44100", "--period", "1024"
        self._spawn("jackd", "--no-realtime", "--name", name, "-d", "dummy", *rate)
        module = "load-module", "module-jack-sink", f"server_name={name}", "sink_name=jack", "channels=2", "connect=no"
        until(lambda: self.control(*module, check=False))

    def recording(self, pid: int) -> bool:
        """Does this process record?"""
        streams = self.control("list", "source-outputs").split("Source Output #")
        return any("Corked: no" in s and f'application.process.id = "{pid}"' in s for s in streams)

    def recording_from_jack(self, pid: int) -> bool:
        """Does some process record from the loudspeaker `jack`?"""
        result = subprocess.run(["jack_lsp", "-c"], env=self.environment, capture_output=True, text=True)
        return "PulseAudio JACK Sink:front-left\n   " in result.stdout

    def play(self, path: Path, speaker: str = "room") -> subprocess.Popen:
        """Play a file; the process ends when it has been heard."""
        return subprocess.Popen(["paplay", f"--device={speaker}", str(path)], env=self.environment)

    def stop(self) -> None:
        """Stop all daemons: JACK last, since with a client left it keeps its place, one of eight, in /dev/shm."""
        for daemon in self._daemons:
            daemon.terminate()
            daemon.wait(20)
        self._log.close()


@contextmanager
def pulseaudio() -> Iterator[Pulse]:
    """A Pulse with its loudspeaker, in a folder whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="pulse") as folder:
        pulse = Pulse(Path(folder))
        try:
            pulse.speaker()
            yield pulse
        finally:
            pulse.stop()


def until(condition, seconds: float = 120) -> None:
    """Wait until `condition()` is true; fail if it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
