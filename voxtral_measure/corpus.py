"""Recordings with their reference texts: folders and manifests in the usual forms.

| form | audio | text | group |
| --- | --- | --- | --- |
| LibriSpeech | `ID.flac` (or another format) | a line `ID TEXT` in the folder's `*.trans.txt` | the speaker |
| folder | any file | a file of the same name ending in `.txt` | the folder that holds it |
| CSV, TSV (with a head line) | a column | a column | a column, if there is one |
| JSONL | a field | a field | a field, if there is one |

The constants list the accepted names of columns and fields: those of Common Voice, NeMo and Hugging Face.
Paths in a manifest are relative to its folder, or to `clips/` in it, as Common Voice publishes them.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from voxtral_client.errors import UserError
from voxtral_client.files import SUFFIXES, files_in
from voxtral_client.media import is_audio

AUDIO_NAMES = ("audio", "path", "file", "audio_filepath", "audio_path", "filename", "file_name", "wav")
TEXT_NAMES = ("text", "sentence", "transcript", "transcription", "reference")
GROUP_NAMES = ("group", "voice", "speaker", "speaker_id", "client_id")


@dataclass(frozen=True)
class Utterance:
    """A recording: its name in reports, its path, its reference text, and the group in which it is counted.

    `text`: None if there is none, and `why` in words; such a recording cannot be scored.
    """

    name: str
    audio: Path
    text: str | None
    group: str
    why: str = ""


def utterances(path: str | Path) -> list[Utterance]:
    """Return the recordings in a folder or a manifest, with those of a folder that have no text.

    Raises UserError where it is missing, empty, malformed or not UTF-8, or names a recording twice.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder or manifest")
    found = list(_folder(path) if path.is_dir() else _manifest(path))
    if not any(item.text is not None for item in found):
        needed = "audio files with texts beside them (talk.wav and talk.txt)" if path.is_dir() else "lines"
        raise UserError(f"{path}: no {needed} there")
    names = [item.name for item in found]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: {max(names, key=names.count)} is named twice")
    return found


def _folder(folder: Path) -> Iterator[Utterance]:
    files = sorted(map(Path, files_in(str(folder))))
    beside = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    lines: dict[Path, tuple[Path, str]] = {}  # of LibriSpeech's texts, by the audio's path without its ending
    for transcript in (path for path in files if path.name.lower().endswith(".trans.txt")):
        del beside[transcript.with_suffix("")]
        for line in filter(None, _read(transcript).splitlines()):
            name, _, text = line.partition(" ")
            lines[transcript.parent / name] = transcript, text
    taken: dict[Path, Path] = {}
    for path in files:
        if path.suffix.lower() == ".txt" or not (path.suffix.lower() in SUFFIXES or is_audio(path)):
            continue
        stem, name, group = path.with_suffix(""), *(str(p.relative_to(folder)) for p in (path, path.parent))
        if first := taken.get(stem):
            yield Utterance(name, path, None, group, f"its text counts for {first.name}")
        elif stem in lines:
            yield Utterance(path.stem, path, lines[stem][1], path.stem.split("-")[0])
        elif stem in beside:
            yield Utterance(name, path, _read(beside[stem]).strip(), group)
        else:
            yield Utterance(name, path, None, group, "it has no text beside it")
        taken.setdefault(stem, path)
    for stem, (transcript, _) in lines.items():
        if stem not in taken:
            raise UserError(f"{transcript}: there is no audio {stem.name} beside it")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8: save it as UTF-8") from None


def _manifest(path: Path) -> Iterator[Utterance]:
    for number, entry in enumerate(_entries(path), 1):
        audio, text, group = (
            next((entry[name] for name in names if entry.get(name) is not None), None)
            for names in (AUDIO_NAMES, TEXT_NAMES, GROUP_NAMES)
        )
        for kind, value, names in (("audio", audio, AUDIO_NAMES), ("text", text, TEXT_NAMES)):
            if not isinstance(value, str):
                raise UserError(f"{path}: entry {number} has no {kind}; name it one of: {', '.join(names)}")
        if None in entry:
            raise UserError(f"{path}: entry {number} has more columns than the head line: a comma or tab in a text?")
        # A path as Windows writes it is looked up as one of this system too.
        places = [path.parent / part / name for name in (audio, audio.replace("\\", "/")) for part in ("", "clips")]
        found = next(filter(Path.is_file, places), places[0])
        yield Utterance(audio, found, text, "." if group is None else str(group))


def _entries(path: Path) -> Iterator[dict]:
    """Yield the entries of a manifest as dictionaries; the key None has what the head line has no name for."""
    kind, file = path.suffix.lower(), StringIO(_read(path))
    try:
        if kind == ".tsv":  # Common Voice quotes nothing: a text may begin with a quotation mark
            yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        elif kind == ".csv":
            yield from csv.DictReader(file, strict=True)
        elif kind in (".jsonl", ".json"):
            for line in filter(str.strip, file):
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError
                yield entry
        else:
            raise UserError(f"{path}: not a manifest; give a folder, or a file ending in .csv, .tsv or .jsonl")
    except csv.Error as error:
        raise UserError(f"{path}: a quotation mark is not closed or not doubled ({error})") from None
    except ValueError:
        raise UserError(f"{path}: not JSONL: each line must be an object {{...}}") from None
