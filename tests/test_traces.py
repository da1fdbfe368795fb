"""One set of traces holds Python, JavaScript and Dart together: tests/traces.json. It has two parts.

`timelines`: a trace is a list of steps. `do` is what happens: `session` (a new one was created; after a fault it
resumes from the last pause), `audio` (runs of [milliseconds, amplitude], all of it received at once), `deltas` (texts;
a number stands for so many empty ones), `fault` (the session broke: no call), `between` (commit between two words),
`drop` (keep so many samples), `blanks`, `final` (the input has ended and all is transcribed). `then` is what Python
makes of it: `committed` (the commit point), `received` and `transcribed` in samples, the `words` that became final in
this step and the `partial` words: [text, start, end, session], in seconds.

`sessions`: `server` is what a scripted server does (tests/scripted.py), `audio` the arguments of `tones`, `client` more
of the job (tests/clients.py). `then` is what Python makes of it: the `states`, the last one being how it ended; the
first sample of the audio of each session in `starts`; the final words. Where the client gives up, each state and each
start stands there once, because the number of attempts is a matter of time.

    python tests/test_traces.py         writes the file again
"""

import contextlib
import itertools
import json
import subprocess
import tempfile
from pathlib import Path

import pytest
from clients import DART, DART_TOO, NODE, drive, needs_dart
from conftest import ROOT
from scripted import ScriptedServer, hearing, scripted, tones

from voxtral_client.audio import to_pcm16
from voxtral_client.timeline import Timeline

FILE = Path(__file__).parent / "traces.json"

QUIET, LOUD = 20, 4000  # amplitudes


def silence(ms: int) -> dict:
    return {"audio": [[ms, QUIET]]}


def speech(*runs: int) -> dict:
    """Runs of voice and silence in turn, in ms."""
    return {"audio": [[ms, QUIET if i % 2 else LOUD] for i, ms in enumerate(runs)]}


def deltas(*texts: object) -> dict:
    return {"deltas": list(texts)}


SESSION, FAULT, FINAL = {"session": True}, {"fault": "connection lost"}, {"final": True}
TWO = [silence(480), speech(400, 800, 400, 1200), deltas(11, " hel", "lo", 13, " wor", "ld", 8)]
TRACES = {
    "words in pieces, with their spaces": [SESSION, *TWO, deltas(6), FINAL],
    "words split over frames and over calls": [
        *[SESSION, silence(330), speech(250), speech(170), silence(25), silence(515), deltas(9, " s", "e", "v", "en")],
        *[silence(900), deltas(10), FINAL],
    ],
    "two words in one delta, and none without a space": [
        *[SESSION, silence(400), speech(300, 60, 300, 900), deltas(13, " one two", 0, ",", 9), FINAL],
    ],
    "silence commits, again and again": [SESSION, silence(2000), deltas(25), silence(2000), deltas(25), FINAL],
    "a fault in the middle resumes from the last pause": [
        *[SESSION, *TWO, speech(400, 200), deltas(2, " lost"), FAULT, SESSION, silence(1000), deltas(9, "found", 16)],
        FINAL,
    ],
    "a fault before anything was transcribed": [
        SESSION,
        silence(500),
        speech(400),
        FAULT,
        *[SESSION, deltas(3)],
        FAULT,
    ],
    "the final flush takes what no pause has committed": [
        *[SESSION, silence(480), speech(400), deltas(11), FINAL, SESSION, deltas(" late"), FINAL],
    ],
    "a final word at the very end": [SESSION, silence(480), speech(400), deltas(11, " end", 10), FINAL],
    "a long speech without a pause": [
        SESSION,
        *[step for i in range(34) for step in (speech(*[440, 60] * 2), deltas(6, f" a{i}", 5, f" b{i}"[: 4 + i % 2]))],
        *[{"between": True}, FAULT, SESSION, silence(1500), deltas(14), FINAL],
    ],
    "an empty session": [SESSION, FAULT, SESSION, FINAL],
    "sound without a word is asked again": [
        *[SESSION, silence(480), speech(5000), deltas(66), {"blanks": True}, FAULT, SESSION, silence(2000), deltas(90)],
        FINAL,
    ],
    "an outage drops the oldest audio": [
        *[SESSION, *TWO, speech(9000, 1000), {"drop": 48000}, SESSION, deltas(12, " late", 20), FINAL],
    ],
    "scripts without spaces": [
        *[SESSION, silence(480), speech(400, 1000), deltas(11, "你", "好", 12), FAULT, SESSION, speech(400, 1000)],
        *[deltas(6, "世界", 12), FAULT, SESSION, speech(400, 1000), deltas(6, "hello", 12), FINAL],
    ],
    "loud and quiet voices": [
        *[SESSION, {"audio": [[500, 6], [600, 20000], [900, 6], [600, 300], [900, 6]]}, deltas(15, " loud", 18)],
        *[deltas(" low", 9), FINAL],
    ],
}

SPEECH = 46  # so many deltas end within a word, the fourth
GONE, BUSY = {"gone": True}, {"after": 0, "error": "The engine is currently busy.", "code": "processing_error"}
DEAD = {"after": SPEECH, "error": "EngineCore encountered an issue.", "code": "processing_error"}
SHORT = {"entry": {"max_model_len": 260}}  # sessions of at most 14.4 s, which roll over at a pause after 7.2 s
ALWAYS, HASTY = {"always": True}, {"client": {"giveUp": 1}}


def faults(*sessions: dict) -> dict:
    return {"server": {"faults": sessions}}


SESSIONS = {
    "no fault": {},
    "the server is restarted": faults({"after": SPEECH, "close": 1012}, GONE, GONE),
    "the connection ends without a close frame": faults({"after": SPEECH, "drop": True}),
    "all sessions are taken, twice": faults(BUSY, BUSY),
    "the engine dies": faults(DEAD, {"http": 503}),
    "no answer": faults({"after": 0, "mute": True}) | {"client": {"stall": 5}},
    "the longest session ends during speech": faults({"after": SPEECH, "done": True}),
    "rollover at a pause": {"server": SHORT, "audio": {"count": 13}},
    "rollover without a pause": {"server": SHORT, "audio": {"count": 36, "gap": 0.06}},
    "sessions too short for a word": faults({"after": 2, "done": True} | ALWAYS) | HASTY,
    "a fault at the same place every time": faults({"after": SPEECH, "close": 1011}, {"after": 5} | ALWAYS) | HASTY,
    "a message is refused": faults({"after": SPEECH, "error": "Invalid audio data", "code": "invalid_audio"}),
    "not the right key": {"server": {"key": "sesame"}, "client": {"key": "wrong"}},
    "messages that are not JSON": {"server": {"garbles": True}},
}


def pcm(runs: list[list[int]], seed: int) -> tuple[bytes, int]:
    """Noise of whole numbers, the same in every language."""
    samples = bytearray()
    for ms, amplitude in runs:
        for _ in range(16 * ms):
            seed = (75 * seed + 74) % 65537
            samples += (seed * (2 * amplitude + 1) // 65537 - amplitude).to_bytes(2, "little", signed=True)
    return bytes(samples), seed


def rows(words: list) -> list[list]:
    return [[word.text, round(word.start, 4), round(word.end, 4), word.session] for word in words]


def replay(steps: list[dict]) -> list[dict]:
    timeline, seed, seen = Timeline(), 1, []
    for step in steps:
        match step:
            case {"session": _}:
                timeline.begin()
            case {"audio": runs}:
                sound, seed = pcm(runs, seed)
                timeline.add_audio(sound)
            case {"deltas": texts}:
                for text in texts:
                    for delta in [""] * text if isinstance(text, int) else [text]:
                        timeline.add_delta(delta)
            case {"between": _}:
                timeline.commit_between_words()
            case {"drop": keep}:
                timeline.drop_oldest(keep)
            case {"blanks": _}:
                timeline.suspect_blanks()
            case {"final": _}:
                timeline.finish()
        then = {"committed": timeline.committed, "received": timeline.received, "transcribed": timeline.transcribed}
        seen.append({"do": step, "then": then | {"words": rows(timeline.take()), "partial": rows(timeline.partial)}})
    return seen


def run_sessions(client: str, folder: Path) -> dict[str, dict]:
    """Run all of SESSIONS at once; return what came of each, as `then` in the file."""
    with contextlib.ExitStack() as stack:
        servers, jobs = [], []
        for number, trace in enumerate(SESSIONS.values()):
            servers.append(stack.enter_context(scripted(hearing(), **trace.get("server", {}))))
            path = folder / str(number)
            path.write_bytes(to_pcm16(tones(**{"count": 6} | trace.get("audio", {}))))
            jobs.append({"url": servers[-1].url, "path": path} | trace.get("client", {}))
        results = drive(client, *jobs)
        runs = zip(SESSIONS, servers, jobs, results, strict=True)
        return {name: outcome(server, job["path"].read_bytes(), result) for name, server, job, result in runs}


def outcome(server: ScriptedServer, sound: bytes, result: dict) -> dict:
    states = [state for state, _ in itertools.groupby(result["states"])]
    starts = [sound.find(session.bytes[:3200]) // 2 for session in server.sessions]
    if result["end"] != "done":
        states.append(result["end"])
    if result["end"] == "gave up":
        states, starts = list(dict.fromkeys(states)), list(dict.fromkeys(starts))
    return {"states": states, "starts": starts, "text": result["text"]}


def written(folder: Path) -> str:
    timelines = [
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(step, ensure_ascii=False) for step in replay(steps)) + "\n]"
        for name, steps in TRACES.items()
    ]
    then = run_sessions("python", folder)
    sessions = [f"{json.dumps(name)}: {json.dumps(SESSIONS[name] | {'then': then[name]})}" for name in SESSIONS]
    parts = {"timelines": timelines, "sessions": sessions}
    return "{\n" + ",\n".join(f'"{part}": {{\n' + ",\n".join(rows) + "\n}" for part, rows in parts.items()) + "\n}\n"


JAVASCRIPT = """
const { Timeline } = await import(process.argv[1]);
const { readFileSync } = await import("node:fs");
const traces = JSON.parse(readFileSync(process.argv[2], "utf8")).timelines;
const places = (seconds) => Math.round(seconds * 1e4) / 1e4;
const rows = (words) => words.map(({ text, start, end, session }) => [text, places(start), places(end), session]);
for (const trace of Object.values(traces)) {
  const timeline = new Timeline();
  let seed = 1;
  for (const step of trace) {
    const { session, audio, deltas, between, drop, blanks, final } = step.do;
    if (session) timeline.begin();
    if (audio) {
      timeline.addAudio(Int16Array.from(audio.flatMap(([ms, amplitude]) => Array.from({ length: 16 * ms }, () => {
        seed = (75 * seed + 74) % 65537;
        return Math.floor((seed * (2 * amplitude + 1)) / 65537) - amplitude;
      }))));
    }
    for (const text of deltas ?? []) {
      for (const delta of typeof text === "number" ? Array(text).fill("") : [text]) timeline.addDelta(delta);
    }
    if (between) timeline.commitBetweenWords();
    if (drop) timeline.dropOldest(drop);
    if (blanks) timeline.suspectBlanks();
    if (final) timeline.finish();
    const { committed, received, transcribed } = timeline;
    step.then = { committed, received, transcribed, words: rows(timeline.take()), partial: rows(timeline.partial) };
  }
}
console.log(JSON.stringify(traces));
"""


def test_the_file_is_what_python_makes_now(tmp_path):
    assert FILE.read_text() == written(tmp_path), "stale: run python tests/test_traces.py"


def test_javascript_makes_the_same_timelines():
    command = [NODE, "--input-type=module", "-e", JAVASCRIPT, ROOT / "captions" / "timeline.js", FILE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    wanted, got = json.loads(FILE.read_text())["timelines"], json.loads(result.stdout)
    for name, steps in wanted.items():
        for number, (step, other) in enumerate(zip(steps, got[name], strict=True)):
            assert other["then"] == step["then"], f"{name}, step {number}: {step['do']}"


@pytest.mark.slow
@needs_dart
def test_dart_makes_the_same_timelines():
    result = subprocess.run([DART, ROOT / "examples" / "client_test.dart"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "12 passed, 0 failed\n"


@pytest.mark.parametrize("client", ["captions", DART_TOO])
def test_other_languages_make_the_same_sessions(client, tmp_path):
    """The same states, as many sessions from the same samples on, and the same words."""
    got, allowed = run_sessions(client, tmp_path), 4000 if client == "dart" else 0  # it knows ends of words to 0.25 s
    for name, trace in json.loads(FILE.read_text())["sessions"].items():
        then, other = trace["then"], got[name]
        assert {**other, "starts": None} == {**then, "starts": None}, name
        off = [abs(a - b) for a, b in zip(then["starts"], other["starts"], strict=True)]
        assert max(off, default=0) <= allowed, (name, then["starts"], other["starts"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FILE.write_text(written(Path(name)))
