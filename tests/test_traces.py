"""One set of traces holds the timelines of Python, JavaScript and Dart together: tests/traces.json.

A trace is a list of steps. `do` is what happens: `session` (a new one was created; after a fault it resumes from the
last pause), `audio` (runs of [milliseconds, amplitude], all of it received at once), `deltas` (texts; a number stands
for so many empty ones), `fault` (the session broke: no call), `between` (commit between two words), `drop` (keep so
many samples), `blanks`, `final` (the input has ended and all is transcribed). `then` is what Python makes of it:
`committed` (the commit point), `received` and `transcribed` in samples, the `words` that became final in this step and
the `partial` words: [text, start, end, session], in seconds. Of what follows this has no say: sessions, `/v1/models`,
waits (tests/test_session.py).

    python tests/test_traces.py         writes the file again
"""

import json
import subprocess
from pathlib import Path

from clients import DART, NODE, needs_dart
from conftest import ROOT

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


def written() -> str:
    traces = [
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(step, ensure_ascii=False) for step in replay(steps)) + "\n]"
        for name, steps in TRACES.items()
    ]
    return "{\n" + ",\n".join(traces) + "\n}\n"


JAVASCRIPT = """
const { Timeline } = await import(process.argv[1]);
const { readFileSync } = await import("node:fs");
const traces = JSON.parse(readFileSync(process.argv[2], "utf8"));
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


def test_the_file_is_what_python_makes_now():
    assert FILE.read_text() == written(), "stale: run python tests/test_traces.py"


def test_javascript_makes_the_same_of_it():
    command = [NODE, "--input-type=module", "-e", JAVASCRIPT, ROOT / "captions" / "timeline.js", FILE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    wanted, got = json.loads(FILE.read_text()), json.loads(result.stdout)
    for name, steps in wanted.items():
        for number, (step, other) in enumerate(zip(steps, got[name], strict=True)):
            assert other["then"] == step["then"], f"{name}, step {number}: {step['do']}"


@needs_dart
def test_dart_makes_the_same_of_it():
    result = subprocess.run([DART, ROOT / "examples" / "client_test.dart"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "12 passed, 0 failed\n"


if __name__ == "__main__":
    FILE.write_text(written())
