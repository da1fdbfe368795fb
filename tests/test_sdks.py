"""Other people's realtime clients, unchanged, against the real server: what their users get.

Each stands in an environment of its own (scripts/install-test-tools). The sample is spoken in three phrases.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
import soundfile
import soxr
from servers import CHECKPOINT, ROOT

TEXT = (CHECKPOINT / "sample.txt").read_text().strip()
PHRASES = ["seven three nine", "kilo oscar tango twenty five thousand", "tuesday october eleven sierra zero"]
CUTS = (0, 2.75, 8.75, 14.5)  # seconds, in its pauses
SDKS = ROOT / "tests" / "sdks"


def python(environment: str) -> Path:
    path = Path(sys.prefix, "sdks", environment, "bin", "python")
    if environment == "home" and not path.exists():
        pytest.skip("wyoming-openai needs Python 3.12 or newer")
    assert path.exists(), "run scripts/install-test-tools"
    return path


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """A folder for each rate, with a file of bare PCM16 for each phrase."""
    folder = tmp_path_factory.mktemp("spoken")
    samples, own = soundfile.read(CHECKPOINT / "sample.wav", dtype="int16")
    for rate in (16_000, 24_000):
        (folder / str(rate)).mkdir()
        for number, (start, end) in enumerate(pairwise(CUTS)):
            phrase = soxr.resample(samples[round(start * own) : round(end * own)], own, rate)
            (folder / str(rate) / f"{number}.pcm").write_bytes(phrase.astype("<i2").tobytes())
    return folder


@pytest.fixture(scope="module")
def vendors(server, spoken) -> dict:
    command = [python("vendors"), SDKS / "vendors.py", str(server.port), spoken]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=200).stdout)


@pytest.mark.parametrize("client", ["openai commits", "openai server_vad", "mistral flushes"])
def test_vendors_sdk(vendors, client):
    """A transcript for each phrase, whether the client or the server ends it; at 24 kHz."""
    assert vendors[client] == PHRASES


def test_mistrals_stream(vendors):
    """transcribe_stream() ends by itself, with the whole text."""
    assert vendors["mistral stream"] == [TEXT]


@pytest.fixture(scope="module")
def voice(server, spoken) -> dict:
    """The server is killed between the second and the third phrase, and started again.

    The clients stand still meanwhile: some give up after seconds, and how long a start takes depends on the machine.
    """
    command = [python("voice"), SDKS / "voice.py", str(server.port), spoken]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "restart\n"
            process.send_signal(signal.SIGSTOP)
            server.kill()
            server.revive()
            process.send_signal(signal.SIGCONT)
            return json.loads(process.communicate("\n", timeout=300)[0])
        finally:
            process.kill()


@pytest.mark.parametrize("client", ["pipecat openai", "pipecat mistral", "livekit openai", "livekit mistral"])
def test_voice_agents(voice, client):
    """A transcript for each turn. The third comes from the new server: the client has connected again by itself."""
    assert voice[client] == {"texts": PHRASES, "error": "None"}


def test_home_assistant(server, spoken):
    """Both ways through wyoming-openai: the voice command as a file, and live."""
    command = [python("home"), SDKS / "home.py", str(server.port), spoken]
    texts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=200).stdout)
    assert texts == {"file": TEXT, "realtime": TEXT}


def test_zoom():
    """Every caption once and in order, also after a failure, after those that the meeting has already."""
    captions, failures = [], [503]

    class Meeting(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(b"7" if self.path == "/closedcaption/seq?id=1&signature=a%3D" else b"")

        def do_POST(self):
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if failures:
                return self.send_error(failures.pop())
            captions.append((self.path, self.headers["Content-Type"], text))
            self.answer(b"")

        def answer(self, body):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Meeting) as zoom:
        threading.Thread(target=zoom.serve_forever).start()
        url = f"http://127.0.0.1:{zoom.server_port}/closedcaption?id=1&signature=a%3D"
        command = [sys.executable, ROOT / "examples" / "zoom.py", url, "de-DE"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            for words in ("Grüße", " aus", " Köln"):
                process.stdin.write(words.encode())
                process.stdin.flush()
                time.sleep(0.2)
            complaint = process.communicate(timeout=60)[1].decode()
        zoom.shutdown()
    assert (process.returncode, complaint) == (0, "zoom: HTTP Error 503: Service Unavailable\n")
    paths = [f"/closedcaption?id=1&signature=a%3D&seq={8 + n}&lang=de-DE" for n in range(len(captions))]
    assert [path for path, _, _ in captions] == paths
    assert "".join(text for _, _, text in captions) == "Grüße aus Köln"
    assert {kind for _, kind, _ in captions} == {"text/plain; charset=utf-8"}
