"""stream_microphone.py as a user runs it, hearing speech that PulseAudio plays to a monitor."""

import contextlib
import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from captioner import Captioner
from proxy import Proxy
from pulse import Pulse, pulseaudio, until
from scripted import Ear, Scripted, scripted, tones
from servers import ROOT, free_port, run_script
from speech import talk, write
from threads import threaded


@pytest.fixture(scope="module")
def pulse():
    with pulseaudio() as pulse:
        yield pulse


@pytest.fixture(autouse=True)
def plugged(pulse):
    """The microphone is there when a test begins, whatever the one before did."""
    pulse.unplug()
    pulse.plug()


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Two talks: (path of a WAV file, words) each."""
    folder, talks = tmp_path_factory.mktemp("speech"), []
    for seed in (22, 245):  # four words each
        samples, spoken = talk(2, seed=seed)
        # one second more, so that the last word is final when the talk is over
        path = write(folder / f"{seed}.wav", np.concatenate([samples, np.zeros(16000, np.float32)]))
        talks.append((path, [text for text, _, _ in spoken]))
    return talks


@contextlib.contextmanager
def captioning(pulse: Pulse, *arguments: object, listens=None, **options: object):
    """Run stream_microphone.py until the block ends; it listens when the block begins."""
    captioner = Captioner(pulse, *arguments, **options)
    try:
        listens = listens or pulse.recording
        until(lambda: captioner.process.poll() is not None or listens(captioner.process.pid))
        yield captioner
    finally:
        captioner.process.kill()
        captioner.end()


def subtitles(path: Path) -> tuple[list[str], list[float]]:
    """Return the words and the times of an SRT file in seconds, having checked its form."""
    words, times = [], []
    for number, cue in enumerate(path.read_text().strip().split("\n\n"), 1):
        head, span, *lines = cue.split("\n")
        assert head == str(number)
        start, end = re.fullmatch(r"(\S{12}) --> (\S{12})", span).groups()
        for time_ in (start, end):
            hours, minutes, seconds = time_.replace(",", ".").split(":")
            times.append(int(hours) * 3600 + int(minutes) * 60 + float(seconds))
        words += " ".join(lines).split()
    assert times == sorted(times)
    return words, times


def test_json_lines_on_stdout(server, pulse, speech):
    """Each word is a line as soon as it is final; the last line says that all is complete. No plain text between."""
    path, spoken = speech[0]
    with captioning(pulse, "--url", server.url, "-d", "SPEAKER.mon", "-f", "jsonl") as captioner:
        pulse.play(path).wait()
        until(lambda: captioner.stdout.count("\n") >= len(spoken) - 1)
        captioner.interrupt()
        assert captioner.end() == 0
        *words, last = map(json.loads, captioner.stdout.splitlines())
    assert [word["text"].strip() for word in words] == spoken
    assert all(0 <= word["start"] < word["end"] for word in words)
    assert last["complete"] is True


def test_captions_subtitles_and_recording(server, pulse, speech, tmp_path):
    """The monitor of a loudspeaker, by name: system audio. First Ctrl+C: the last words still arrive."""
    path, spoken = speech[0]
    srt, kept = tmp_path / "a.srt", tmp_path / "a.wav"
    options = "--url", server.url, "--device", "SPEAKER.mon", "--output", srt, "--record", kept
    with captioning(pulse, *options) as captioner:
        pulse.play(path).wait()
        captioner.heard(spoken[:-1])
        assert subtitles(srt)[0] == captioner.words  # written live
        until(lambda: soundfile.info(kept).duration > soundfile.info(path).duration + 1)  # whole although it grows
        captioner.interrupt()
        assert captioner.end() == 0
        assert captioner.stdout == " ".join(spoken) + "\n"
        assert "the last words are coming" in captioner.stderr
        words, times = subtitles(srt)
        assert words == spoken
        played, _ = soundfile.read(path)
        recorded, rate = soundfile.read(kept)
        assert rate == 16000
        # The first caption stands where the first sound is.
        heard, said = (np.flatnonzero(np.abs(samples) > 0.02) / rate for samples in (recorded, played))
        assert abs(times[0] - heard[0]) < 0.3
        # From the first sound to the last, nothing is missing.
        assert abs(np.ptp(heard) - np.ptp(said)) < 0.1


def test_recording_transcribed_afterwards(server, pulse, speech, tmp_path):
    """Killed while it records: test_file_transcribe.py still reads what was kept, down to the last moment."""
    path, spoken = speech[1]
    kept = tmp_path / "a.wav"
    with captioning(pulse, "--url", server.url, "--device", "mic", "--record", kept) as captioner:
        pulse.play(path).wait()
        time.sleep(0.5)
        captioner.process.kill()
        captioner.end()
    result = run_script("test_file_transcribe.py", kept, "--url", server.url)
    assert (result.returncode, result.stdout.split()) == (0, spoken), (result.stderr, soundfile.info(kept))


def test_device_unplugged_and_back(server, pulse, speech, tmp_path):
    (path, before), (other, after) = speech
    out, kept = tmp_path / "a.json", tmp_path / "a.flac"
    with captioning(pulse, "--url", server.url, "--device", "mic", "--output", out, "--record", kept) as captioner:
        pulse.play(path).wait()
        unheard = pulse.play(other)
        time.sleep(2)
        pulse.unplug()
        captioner.said("mic is gone")
        captioner.heard(before)  # the last words arrive without the device
        unheard.kill()
        unheard.wait()
        assert captioner.process.poll() is None
        pulse.plug()
        captioner.said("mic is back")
        until(lambda: pulse.recording(captioner.process.pid))
        pulse.play(other).wait()
        captioner.interrupt()
        assert captioner.end() == 0
        words = captioner.words
        assert words[: len(before)] == before
        assert words[-len(after) :] == after
        half_heard = words[len(before) : -len(after)]
        assert len(half_heard) <= 4
        assert half_heard[:-1] == after[: max(0, len(half_heard) - 1)]
        assert captioner.stderr.count("mic is gone") == captioner.stderr.count("mic is back") == 1
        assert [word["text"] for word in json.loads(out.read_text())["words"]] == words
        assert soundfile.info(kept).duration > 10


def test_a_gap_counts_at_its_real_length(pulse, tmp_path):
    """The microphone is away for six seconds: later words have their own times, and the file says what is missing."""
    sound = np.concatenate([tones(3), np.zeros(16000, np.float32)])
    path, out, kept = write(tmp_path / "tones.wav", sound), tmp_path / "a.json", tmp_path / "a.wav"
    with (
        scripted(lambda: Scripted(speak=Ear([" one", " two", " three"]))) as server,
        captioning(pulse, "--url", server.url, "--device", "mic", "-o", out, "--record", kept) as captioner,
    ):
        begun = time.monotonic()
        pulse.play(path).wait()
        captioner.heard(["one", "two"])
        pulse.unplug()
        unplugged = time.monotonic()
        captioner.said("mic is gone")
        time.sleep(6)
        pulse.plug()
        plugged = time.monotonic()
        captioner.said("mic is back")
        until(lambda: pulse.recording(captioner.process.pid))
        pulse.play(path).wait()
        captioner.heard(6 * ["word"])
        took = time.monotonic() - begun
        captioner.interrupt()
        assert captioner.end() == 0
    found, (recorded, rate) = json.loads(out.read_text()), soundfile.read(kept)
    assert found["complete"] is False
    ((gone, back),) = found["missing"]
    assert back - gone == pytest.approx(plugged - unplugged, abs=2)
    assert len(recorded) / rate == pytest.approx(took, abs=1.5)
    assert np.abs(recorded[round(gone * rate) + 9 : round(back * rate) - 9]).max() == 0
    loud = back + np.flatnonzero(np.abs(recorded[round(back * rate) :]) > 0.02)[0] / rate
    assert found["words"][3]["start"] == pytest.approx(loud, abs=0.3)


def test_suspended_device(server, pulse, speech):
    """Audio stops coming while the stream stays active."""
    path, spoken = speech[1]
    with captioning(pulse, "--url", server.url, "--device", "mic") as captioner:
        pulse.control("suspend-source", "mic", "1")
        captioner.said("mic is gone")
        pulse.control("suspend-source", "mic", "0")
        captioner.said("mic is back")
        until(lambda: pulse.recording(captioner.process.pid))
        pulse.play(path).wait()
        captioner.interrupt()
        assert captioner.end() == 0
        assert captioner.words == spoken


@pytest.mark.parametrize("stopped", ["program", "loop"])
def test_standing_still_for_some_seconds_is_no_unplugged_device(pulse, speech, stopped, tmp_path):
    """The whole program stops (a laptop that swaps), or its event loop alone (a terminal with Ctrl+S)."""
    stall = "import asyncio, time; real = asyncio.Runner.run\n"
    stall += "async def late(main): asyncio.get_running_loop().call_later(2, time.sleep, 4); return await main\n"
    stall += "asyncio.Runner.run = lambda self, main, **options: real(self, late(main), **options)\n"
    (tmp_path / "sitecustomize.py").write_text(stall if stopped == "loop" else "")
    environment = {"PYTHONPATH": str(tmp_path)}
    with (
        scripted() as server,
        captioning(pulse, "--url", server.url, "--device", "mic", environment=environment) as captioner,
    ):
        until(lambda: server.sessions and server.sessions[0].bytes)  # stopped before its first block, it has no audio
        if stopped == "program":
            captioner.process.send_signal(signal.SIGSTOP)
            time.sleep(4)
            captioner.process.send_signal(signal.SIGCONT)
        else:
            time.sleep(6)
        time.sleep(3)
        captioner.interrupt()
        assert captioner.end() == 0
        assert "gone" not in captioner.stderr
        heard = re.search(r"0:00:(\d\d) heard", captioner.stderr)
        assert int(heard[1]) >= 6, captioner.stderr


def test_what_a_person_sees_after_a_resume(server, pulse, speech):
    """On a narrow terminal: the connection breaks in mid-speech and stays away for some seconds."""
    (path, first), (other, second) = speech
    with (
        threaded(Proxy(server.port)) as proxy,
        captioning(pulse, "--url", proxy.url, "--device", "mic", terminal=True) as captioner,
    ):
        until(lambda: re.search(r"listening +━+ +-\d+ dB  0:00:\d\d  lag \d\.\d s  mic", captioner.seen()))
        playing = pulse.play(path)
        time.sleep(2.5)
        proxy.refusing = True
        proxy.cut()
        playing.wait()
        until(lambda: "● waiting" in captioner.seen())
        proxy.refusing = False
        until(lambda: "connected again" in captioner.seen())
        pulse.play(other).wait()
        captioner.interrupt()
        assert captioner.end() == 0
        lines = captioner.seen().splitlines()
        text = [line for line in lines if line and not set(line.split()) - set(first + second)]
        notes = " ".join(line for line in lines if line not in text)
        assert " ".join(text).split() == first + second
        assert all(notes.count(note) == 1 for note in ("connection lost", "connected again", "last words"))
        assert "●" not in notes  # the status line is gone


def test_server_killed_and_restarted(pulse, tmp_path):
    """In mid-speech; for some seconds nobody listens there, and the new server knows nothing of the old one's session.

    With the real server: test_faults.py. What counts here is that the microphone goes on.
    """
    spoken = [f"word{number}" for number in range(9)]
    sound = np.concatenate([tones(len(spoken)), np.zeros(16000, np.float32)])
    path = write(tmp_path / "tones.wav", sound)

    def hearing() -> Scripted:
        return Scripted(speak=Ear([f" {word}" for word in spoken]))

    with contextlib.ExitStack() as life:
        server = life.enter_context(scripted(hearing))
        options = "--url", server.url, "--device", "mic", "--output", tmp_path / "a.txt"
        with captioning(pulse, *options) as captioner:
            playing = pulse.play(path)
            captioner.heard(spoken[:3])
            life.close()
            captioner.said("trying again")
            playing.wait()
            life.enter_context(scripted(hearing, port=server.port))
            captioner.said("connected again")
            captioner.heard(spoken[:-1])
            captioner.interrupt()
            assert captioner.end() == 0
            assert captioner.words == spoken
            assert (tmp_path / "a.txt").read_text().split() == spoken


def test_captions_that_lack_audio_are_not_complete(pulse, tmp_path):
    """The server stays away for longer than audio is kept (here 2 s): the user is told, the file too."""
    keep = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom voxtral_client import transcriber\n"
    (tmp_path / "sitecustomize.py").write_text(keep + "transcriber.KEEP_SECONDS = 2.0\n")
    options = {"environment": {"PYTHONPATH": str(tmp_path)}}
    with contextlib.ExitStack() as life:
        server = life.enter_context(scripted())
        arguments = "--url", server.url, "--device", "mic", "--output", tmp_path / "a.json"
        with captioning(pulse, *arguments, **options) as captioner:
            until(lambda: server.sessions)
            life.close()
            captioner.said("from now on the oldest audio is lost")
            life.enter_context(scripted(port=server.port))
            captioner.said("connected again; lost: audio from 0:00:0")
            captioner.interrupt()
            assert captioner.end() == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["words"], found["complete"], len(found["missing"])) == ([], False, 1)


def test_second_interrupt_stops_at_once(server, pulse, speech, tmp_path):
    """The final words are there, and the file is whole."""
    path, spoken = speech[0]
    with (
        threaded(Proxy(server.port)) as proxy,
        captioning(pulse, "--url", proxy.url, "--device", "mic", "--output", tmp_path / "a.vtt") as captioner,
    ):
        pulse.play(path).wait()
        captioner.heard(spoken[:-1])
        proxy.refusing = True  # the server is gone: there is something to wait for
        proxy.cut()
        captioner.said("trying again")
        captioner.interrupt()
        captioner.said("Ctrl+C again")
        captioner.interrupt()
        assert captioner.end() == 130
        assert captioner.words == spoken[: len(captioner.words)]
        cues = (tmp_path / "a.vtt").read_text().split("\n\n")
        assert cues[0] == "WEBVTT"
        assert " ".join(cue.split("\n", 2)[2].replace("\n", " ") for cue in cues[1:-1]) == captioner.stdout.strip()


def test_words_of_a_talk_that_cannot_go_on(pulse, tmp_path):
    """The server is gone for good in the middle of a sentence: what was on the screen is in the file, and marked."""
    said = []

    def hearing() -> Scripted:
        ear = Ear([f" word{number}" for number in range(20)])
        return Scripted(speak=lambda pcm, k: said.append(ear(pcm, k)) or said[-1])

    path = write(tmp_path / "tones.wav", tones(20, gap=0.06))
    with contextlib.ExitStack() as life:
        server = life.enter_context(scripted(hearing))
        options = "--url", server.url, "--device", "mic", "--output", tmp_path / "a.json", "--give-up-after", 1
        with captioning(pulse, *options) as captioner:
            playing = pulse.play(path)
            until(lambda: "".join(said).count("word") >= 5)
            life.close()
            assert captioner.end() == 1
            playing.wait()
    found = json.loads((tmp_path / "a.json").read_text())
    assert [word["text"] for word in found["words"][:3]] == ["word0", "word1", "word2"]
    assert all(word["partial"] for word in found["words"])
    assert found["complete"] is False


# Ends what listens to the microphone in the same moment in which the third block arrives.
ENDED_BY_A_BLOCK = """
import asyncio, itertools
from voxtral_client import microphone

async def main():
    blocks = itertools.count(1)

    class Arrival(asyncio.Event):
        def set(self):
            super().set()
            if next(blocks) == 3:
                listening.cancel()

    class Capture(microphone._Capture):
        def __init__(self, *options):
            super().__init__(*options)
            self._more = Arrival()

    async def listen():
        async for _ in microphone.Microphone("mic", None, print).chunks(asyncio.Event()):
            pass

    microphone._Capture = Capture
    listening = asyncio.create_task(listen())
    await asyncio.wait([listening], timeout=20)
    print("ended" if listening.cancelled() else "goes on")

asyncio.run(main())
"""


def test_end_in_the_moment_in_which_a_block_arrives(pulse):
    """A talk that cannot go on, or a second Ctrl+C: asyncio.wait_for of Python 3.11 may then go on for ever."""
    command = [sys.executable, "-c", ENDED_BY_A_BLOCK]
    result = subprocess.run(command, cwd=ROOT, env=pulse.environment, capture_output=True, text=True, timeout=60)
    assert result.stdout == "ended\n", result.stderr


def test_device_of_44100_hz_stereo_only(server, pulse, speech):
    """JACK offers no other rate: unlike PulseAudio, it does not resample."""
    path, spoken = speech[0]
    name = "voxtral-tests"  # always the same: JACK then takes the place that a killed run may have left
    pulse.environment["JACK_DEFAULT_SERVER"] = name
    rate = "--rate", "44100", "--period", "1024"
    pulse.start("jackd", "--no-realtime", "--name", name, "-d", "dummy", *rate)
    module = "load-module", "module-jack-sink", f"server_name={name}", "sink_name=jack", "channels=2", "connect=no"
    until(lambda: pulse.control(*module, check=False))

    def recording(pid: int) -> bool:
        result = subprocess.run(["jack_lsp", "-c"], env=pulse.environment, capture_output=True, text=True)
        return "PulseAudio JACK Sink:front-left\n   " in result.stdout

    options = "--url", server.url, "--device", "PulseAudio JACK Sink", "--channels", "2"
    with captioning(pulse, *options, listens=recording) as captioner:
        pulse.play(path, "jack").wait()
        captioner.interrupt()
        assert captioner.end() == 0
        assert captioner.words == spoken


def test_silence_and_duration(server, pulse):
    """One hint with the device's name and the level; --max-duration ends it."""
    with captioning(pulse, "--url", server.url, "--max-duration", "13") as captioner:
        assert captioner.end() == 0
        assert captioner.stdout == ""
        hints = [line for line in captioner.stderr.splitlines() if "nothing heard for 10 s" in line]
        assert len(hints) == 1
        assert "default (level -100 dB)" in hints[0]
        assert "--list-devices" in hints[0]


def test_disk_full(server, pulse, speech, tmp_path):
    """The recording cannot grow any more: said once, the captions go on."""
    path, spoken = speech[1]
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))}
    with captioning(pulse, "--url", server.url, "--record", tmp_path / "a.wav", **full) as captioner:
        pulse.play(path).wait()
        captioner.interrupt()
        assert captioner.end() == 1
        assert captioner.words == spoken
        assert captioner.stderr.count("File too large; continuing without it") == 1
        assert 2.9 < soundfile.info(tmp_path / "a.wav").duration < 3.2


def test_an_output_file_that_cannot_grow(pulse, tmp_path):
    """The captions go on; the file keeps what it had, marked as unfinished, and the exit code says so."""
    spoken = [f"word{number}" for number in range(6)]
    out, sound = tmp_path / "a.srt", np.concatenate([tones(6), np.zeros(16000, np.float32)])
    path = write(tmp_path / "tones.wav", sound)
    (tmp_path / "client.conf").write_text("enable-shm = no\n")  # PulseAudio's memory counts as a file
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))}
    full["environment"] = {"PULSE_CLIENTCONFIG": str(tmp_path / "client.conf")}
    with (
        scripted(lambda: Scripted(speak=Ear([f" {word}" for word in spoken]))) as server,
        captioning(pulse, "--url", server.url, "--device", "mic", "-o", out, **full) as captioner,
    ):
        pulse.play(path).wait()
        captioner.heard(spoken[:-1])
        captioner.interrupt()
        assert captioner.end() == 1
    assert captioner.words == spoken
    assert captioner.stderr.count("a.srt: cannot be written (File too large); trying again with each word") == 1
    assert subtitles(out)[0] == spoken[: len(subtitles(out)[0])]
    assert out.with_name("a.srt.unfinished").exists()


def fails(pulse: Pulse, code: int, *arguments: object, **environment: str) -> str:
    """Run it; return its one line on stderr."""
    script = [sys.executable, ROOT / "stream_microphone.py", *map(str, arguments)]
    result = subprocess.run(
        script,
        env=pulse.environment | environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == code, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 or lines[0].startswith("usage:"), result.stderr
    return lines[-1]


def test_without_portaudio(pulse, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import ctypes.util\nctypes.util.find_library = lambda name: None\n")
    assert "apt install libportaudio2" in fails(pulse, 1, PYTHONPATH=str(tmp_path))
    assert "apt install libportaudio2" in fails(pulse, 1, "--list-devices", PYTHONPATH=str(tmp_path))


def test_without_input_device(pulse):
    for arguments in ((), ("--list-devices",)):
        line = fails(pulse, 1, *arguments, PULSE_SERVER="unix:/nowhere", JACK_DEFAULT_SERVER="nobody")
        assert "no input device" in line


def test_device_names(pulse):
    listed = subprocess.run(
        [sys.executable, ROOT / "stream_microphone.py", "--list-devices"],
        env=pulse.environment,
        capture_output=True,
        text=True,
    ).stdout
    assert re.search(r"^\*  \d+ default \(ALSA\)$", listed, re.M)
    numbers = dict(re.findall(r"(\d+) (\S+) \(PulseAudio\)", listed))
    assert set(numbers.values()) >= {"mic", "speaker.monitor"}
    line = fails(pulse, 1, "--device", "m")
    assert "mic (" in line
    assert " and " in line
    assert "speaker.monitor (" in line
    for unknown in ("bathroom", "99"):
        assert "--list-devices" in fails(pulse, 1, "--device", unknown)
    number = next(number for number, name in numbers.items() if name == "mic")
    nobody = f"ws://127.0.0.1:{free_port()}"
    assert "./serve.sh" in fails(pulse, 1, "--device", number, "--url", nobody)
    assert "--list-devices" not in fails(pulse, 1, "--device", "mic", "--url", nobody)


def test_channels_that_the_device_has_not(server, pulse, tmp_path):
    options = "--url", server.url, "--device", "mic", "--channels", "99", "--record", tmp_path / "a.wav"
    options += "--output", tmp_path / "a.srt"
    for _ in range(2):  # nothing is left behind that would be in the way
        assert "with 99 channels" in fails(pulse, 1, *options)


def test_files(server, pulse, tmp_path):
    """A recording and captions never replace earlier ones; a path that cannot be written is named."""
    (tmp_path / "a.wav").write_bytes(b"precious")
    assert "exists already" in fails(pulse, 1, "--url", server.url, "--record", tmp_path / "a.wav")
    (tmp_path / "a.srt").write_bytes(b"precious")
    options = "--record", tmp_path / "new.wav", "--output", tmp_path / "a.srt"
    assert "a.srt: exists already" in fails(pulse, 1, "--url", server.url, *options)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"precious"}
    assert (tmp_path / "a.wav").read_bytes() == b"precious"
    for option in ("--record", "--output"):
        name = tmp_path / "a.srt" / ("a.wav" if option == "--record" else "a.srt")
        assert str(name) in fails(pulse, 1, "--url", server.url, option, name)
        assert "cannot tell the format" in fails(pulse, 2, "--url", server.url, option, tmp_path / "a.xyz")


@pytest.mark.parametrize("option", [("--channels", "0"), ("--max-duration", "0"), ("--no-such-option",)])
def test_usage(pulse, option):
    assert "error:" in fails(pulse, 2, *option)
