"""Recordings with their reference texts: folders and manifests in the usual forms.

| form | audio | text | group |
| --- | --- | --- | --- |
| LibriSpeech | `ID.flac` (or another format) | a line `ID TEXT` in the folder's `*.trans.txt` | the speaker |
| folder | any file | a file of the same name ending in `.txt` | the folder that holds it |
| CSV, TSV (with a head line) | a column | a column | a column, if there is one |
| JSONL | a field | a field | a field, if there is one |

The constants list the accepted names of columns and fields: those of Common Voice, NeMo and Hugging Face.
Paths in a manifest are relative to its folder.
"""

import csv
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from voxtral_client import UserError

AUDIO_NAMES = ("audio", "path", "file", "audio_filepath", "audio_path", "filename", "file_name", "wav")
TEXT_NAMES = ("text", "sentence", "transcript", "transcription", "reference")
GROUP_NAMES = ("group", "voice", "speaker", "speaker_id", "client_id")
NOT_AUDIO = (".txt", ".json", ".srt", ".vtt", ".csv", ".tsv", ".jsonl", ".md")


@dataclass(frozen=True)
class Utterance:
    """A recording: its name in reports, its path, its reference text, and the group in which it is counted."""

    name: str
    audio: Path
    text: str
    group: str


def utterances(path: str | Path) -> list[Utterance]:
    """Return the recordings in a folder or a manifest.

    Raises UserError where it is missing, empty, malformed or not UTF-8, or names a recording twice.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder or manifest")
    try:
        found = list(_folder(path) if path.is_dir() else _manifest(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: the texts are not UTF-8") from None
    if not found:
        needed = "audio files with texts beside them (talk.wav and talk.txt)" if path.is_dir() else "lines"
        raise UserError(f"{path}: no {needed} there")
    names = [item.name for item in found]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: {max(names, key=names.count)} is named twice")
    return found


def _folder(folder: Path) -> Iterator[Utterance]:
    audio_in = functools.cache(_audio_in)  # corpora have tens of thousands of files in one folder
    libri = sorted(folder.rglob("*.trans.txt"))
    for transcript in libri:
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            audio = audio_in(transcript.parent).get(name)
            if name and audio is None:
                raise UserError(f"{transcript}: there is no audio {name} beside it")
            if name:
                yield Utterance(name, audio, text, name.split("-")[0])
    for text in sorted(folder.rglob("*.txt")) if not libri else ():
        if audio := audio_in(text.parent).get(text.stem):
            name, group = (str(p.relative_to(folder)) for p in (audio, text.parent))
            yield Utterance(name, audio, text.read_text(encoding="utf-8").strip(), group)


def _audio_in(folder: Path) -> dict[str, Path]:
    """Return the audio files in a folder by their name without its ending; of several the first."""
    audio = (path for path in sorted(folder.iterdir(), reverse=True) if path.suffix not in NOT_AUDIO)
    return {path.stem: path for path in audio}


def _manifest(path: Path) -> Iterator[Utterance]:
    for number, entry in enumerate(_entries(path), 1):
        audio, text, group = (
            next((entry[name] for name in names if entry.get(name) is not None), None)
            for names in (AUDIO_NAMES, TEXT_NAMES, GROUP_NAMES)
        )
        for kind, value, names in (("audio", audio, AUDIO_NAMES), ("text", text, TEXT_NAMES)):
            if not isinstance(value, str):
                raise UserError(f"{path}: entry {number} has no {kind}; name it one of: {', '.join(names)}")
        yield Utterance(audio, path.parent / audio, text, "." if group is None else str(group))


def _entries(path: Path) -> Iterator[dict]:
    """Yield the entries of a manifest as dictionaries."""
    kind = path.suffix.lower()
    with path.open(encoding="utf-8-sig", newline="") as file:
        if kind in (".csv", ".tsv"):
            yield from csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
        elif kind in (".jsonl", ".json"):
            for line in filter(str.strip, file):
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = None
                if not isinstance(entry, dict):
                    raise UserError(f"{path}: not JSONL: each line must be an object {{...}}")
                yield entry
        else:
            raise UserError(f"{path}: not a manifest; give a folder, or a file ending in .csv, .tsv or .jsonl")
