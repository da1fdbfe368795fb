"""Compose and augment training streams on the GPU: audio, the token of each frame, and its weight.

A stream is a sequence of clips with gaps, by one voice or by several. Clips are resampled (speed and pitch together).
The stream is filtered, reverberated, mixed with noise, and scaled, from very quiet up to clipping.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import DELAY, SAMPLES, Tensor, features, mel_filters
from scipy.signal import lfilter, resample_poly
from words import PAD, WORD, WORDS, tokens

RATE = 16000
LEAD = 640  # samples before the speech in a trimmed clip
PARTS = 3  # tokens of a word at most, [STREAMING_WORD] included
# How often each source is drawn. A voice's source is the name before its first "-". "other" has no known word.
SHARES = {"allison": 16, "fsdd": 22, "kokoro": 20, "espeak": 20, "flite": 14, "festival": 5, "phrase": 7, "other": 7,
          "allison-other": 4, "sound": 5}  # fmt: skip
WARPS = torch.linspace(0.86, 1.16, 21).tolist()


def noises(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Return sounds at 16 kHz that are not speech: bursts, tones, chords, chirps, clicks, knocks, buzzes, keys."""
    out = []
    for i in range(count):
        n = int(rng.uniform(0.1, 2.0) * RATE)
        t = np.arange(n) / RATE
        pitch = np.exp(rng.uniform(np.log(80), np.log(3000)))
        envelope = np.minimum(1, np.minimum(t / rng.uniform(0.003, 0.2), t[::-1] / rng.uniform(0.01, 0.3)))
        kind = i % 8
        if kind == 0:  # a burst of noise of some colour
            x = lfilter([1], [1, -rng.uniform(-0.9, 0.99)], rng.standard_normal(n)) * envelope
        elif kind == 1:  # a tone with overtones, which may decay
            x = sum(np.sin(2 * np.pi * pitch * k * t) * rng.uniform() / k for k in range(1, 6))
            x = x * np.exp(-t * rng.choice([0, 3, 10])) * envelope
        elif kind == 2:  # a chord
            notes = pitch * 2 ** (rng.choice([0, 3, 4, 7, 10, 12], 4) / 12)
            x = sum(np.sin(2 * np.pi * f * t) + 0.3 * np.sin(4 * np.pi * f * t) for f in notes) * envelope
        elif kind == 3:  # a chirp
            x = np.sin(2 * np.pi * pitch * t * (1 + rng.uniform(-0.4, 1) * t / t[-1] / 2)) * envelope
        elif kind == 4:  # clicks
            x = np.where(rng.uniform(size=n) < 10 ** rng.uniform(-4, -2.5), rng.standard_normal(n), 0)
            x = lfilter([1], [1, -rng.uniform(0, 0.95)], x)
        elif kind == 5:  # a knock
            x = lfilter([1], [1, -1.9 * np.cos(pitch / RATE), 0.93], rng.standard_normal(n))
            x = x * np.exp(-t * rng.uniform(8, 60))
        elif kind == 6:  # a buzz through a resonance, like a held vowel
            x = ((t * rng.uniform(70, 300)) % 1 - 0.5) * envelope
            for f in (rng.uniform(300, 900), rng.uniform(900, 2500)):
                x = lfilter([1], [1, -2 * 0.97 * np.cos(2 * np.pi * f / RATE), 0.97**2], x)
        else:  # two keys of a telephone, one after the other
            low, high = rng.choice([697, 770, 852, 941], 2), rng.choice([1209, 1336, 1477], 2)
            which = (t > t[-1] / 2).astype(int)
            x = (np.sin(2 * np.pi * low[which] * t) + np.sin(2 * np.pi * high[which] * t)) * envelope
        out.append((0.5 * x / (np.abs(x).max() + 1e-6)).astype(np.float32))
    return out


def decode(codes: np.ndarray) -> np.ndarray:
    """Return the samples, float32 in [-1, 1], of make_data's mu-law."""
    x = np.arange(256, dtype=np.float32) / 127.5 - 1
    return (np.sign(x) * (256 ** np.abs(x) - 1) / 255)[codes]


def clips(paths: Iterable[Path]) -> Iterator[tuple]:
    """Yield the clips of make_data's files: samples at 16 kHz, word numbers, word ends in seconds, voice, held out?

    Word numbers and ends have MAX_WORDS entries. A word number of -1 means no word.
    """
    for path in paths:
        data = dict(np.load(path))
        parts = np.split(decode(data["audio"]), np.cumsum(data["length"])[:-1])
        columns = (data[name] for name in ("rate", "words", "ends", "voice", "held_out"))
        for clip, rate, words, ends, voice, held_out in zip(parts, *columns, strict=True):
            yield clip if rate == RATE else resample_poly(clip, 2, 1), words, ends, str(voice), held_out


@dataclass
class Batch:
    audio: Tensor  # [streams, samples]
    first: Tensor  # mel frames of the first chunk, and of all
    later: Tensor
    targets: Tensor  # [streams, frames]
    weights: Tensor
    texts: list[list[str]] | None = None
    ends: list[list[float]] | None = None


class Streams:
    def __init__(self, folder: Path, device: str, held_out: bool = False, seed: int = 0) -> None:
        """Load the held-out clips of a folder, or all others, into the device's memory. Raises SystemExit: no clips."""
        loaded = [clip for clip in clips(sorted(folder.glob("*.npz"))) if clip[4] == held_out]
        if not loaded:
            raise SystemExit(f"{folder} has no clips {'held out of' if held_out else 'for'} training: run make_data.py")
        for noise in [] if held_out else noises(np.random.default_rng(seed), 640):
            loaded.append((noise, np.full_like(loaded[0][1], -1), np.zeros_like(loaded[0][2]), "sound", False))
        audio, words, ends, voices, _ = zip(*loaded, strict=True)
        self.device = device
        self.random = torch.Generator(device=device).manual_seed(seed)
        length = np.array([len(clip) for clip in audio])
        samples = np.clip(np.concatenate([*audio, np.zeros(8)]) * 32767, -32767, 32767).astype(np.int16)

        def to_device(x: np.ndarray | list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(np.asarray(x), dtype=dtype, device=device)

        self.samples = to_device(samples, torch.int16)
        self.length = to_device(length, torch.long)
        self.offset = to_device(np.concatenate(([0], np.cumsum(length)[:-1])), torch.long)
        self.words = to_device(np.stack(words), torch.long)
        self.ends = to_device(np.stack(ends) * RATE, torch.float32)
        # Clips are grouped by voice: a voice is drawn by its source's share, then one of its clips.
        names = sorted(set(voices))
        index = {name: i for i, name in enumerate(names)}
        self.voice_names = names
        order = np.argsort([index[v] for v in voices], kind="stable")
        count = np.bincount([index[v] for v in voices])
        self.order = to_device(order, torch.long)
        self.voice_count = to_device(count, torch.long)
        self.voice_start = to_device(np.cumsum(count) - count, torch.long)
        source = [name if name in SHARES else name.split("-")[0] for name in names]
        several = {s: source.count(s) for s in source}
        if held_out:
            share = np.ones(len(names))
        else:
            # The voices of a source are equally likely. These two have many small voices: there the clips are.
            clips_of = {s: sum(count[[t == s for t in source]]) for s in source}
            part = [
                c / clips_of[s] if s in ("phrase", "other") else 1 / several[s]
                for s, c in zip(source, count, strict=True)
            ]
            share = np.array([SHARES[s] * p for s, p in zip(source, part, strict=True)])
        self.voice_share = to_device(share / share.sum(), torch.float32)
        table = torch.full((len(WORDS) + 1, PARTS), -1, device=device)
        for i, word in enumerate(WORDS):
            for j, token in enumerate([WORD, *tokens(word)]):
                table[i, j] = token
        self.table = table  # the last row, which is index -1, means "no word"
        self.filters = torch.stack([mel_filters(warp) for warp in WARPS]).to(device)
        self.plain = mel_filters().to(device)
        self.known = torch.unique(table[table >= 0])

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=self.random, device=self.device) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, device=self.device)

    def draw(self, streams: int, slots: int, mixed: Tensor) -> Tensor:
        """Return the clip in each slot, [streams, slots]. Without `mixed`, most clips of a stream have one voice."""
        voice = torch.multinomial(self.voice_share, streams * slots, True, generator=self.random).view(streams, slots)
        own = voice[:, :1].expand(-1, slots)
        voice = torch.where(mixed[:, None] | (self.uniform(streams, slots) < 0.15), voice, own)
        pick = (self.uniform(streams, slots) * self.voice_count[voice]).long()
        return self.order[self.voice_start[voice] + torch.minimum(pick, self.voice_count[voice] - 1)]

    def compose(self, streams: int, frames: int, plain: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return clips in sequence: audio and where it is speech, [streams, samples]; id, start and end of each word.

        Starts and ends are in samples, [streams, words].
        """
        samples, slots = frames * SAMPLES, max(4, int(frames * 0.25))
        mixed = self.uniform(streams) < 0.4
        clip = self.draw(streams, slots, mixed)
        if plain:
            rate = torch.ones(streams, slots, device=self.device)
        else:
            spread = torch.where(mixed, 0.2, 0.05)[:, None]
            rate = torch.exp(
                self.uniform(streams, 1, low=-0.2, high=0.2) * (~mixed)[:, None]
                + self.uniform(streams, slots, low=-1, high=1) * spread
            )
        backwards = (self.uniform(streams, slots) < 0.03) & (not plain)
        words = torch.where(backwards[..., None], -1, self.words[clip])
        ends = self.ends[clip] / rate[..., None]
        length = self.length[clip] / rate
        lead = LEAD / rate
        speech = torch.where((words >= 0).any(-1), ends.amax(-1), length - 1.5 * lead)  # its end within the clip

        # Gaps between the end of speech and the next beginning: connected, a list, slow, sparse.
        low = torch.tensor([-0.06, 0.05, 0.3, 0.5], device=self.device)
        high = torch.tensor([0.1, 0.5, 1.5, 5.0], device=self.device)
        chance = torch.tensor([0.28, 0.42, 0.2, 0.1], device=self.device)
        style = torch.multinomial(chance, streams, True, generator=self.random)[:, None].expand(-1, slots)
        other = torch.multinomial(chance, streams * slots, True, generator=self.random).view(streams, slots)
        style = torch.where(self.uniform(streams, slots) < 0.2, other, style)
        if plain:
            style = torch.ones_like(style)
        gap = RATE * (low[style] + (high - low)[style] * self.uniform(streams, slots))
        step = speech - lead + gap
        begin = self.uniform(streams, 1, low=0.05, high=0.6) * RATE  # of the first clip's speech
        if not plain:
            middle = self.uniform(streams, 1) < 0.25  # a session that begins in the middle of a word
            begin = torch.where(middle, -self.uniform(streams, 1) * (speech - lead)[:, :1], begin)
        start = begin - lead + torch.cumsum(step, 1) - step

        level = 10 ** (self.normal(streams, slots).clamp(-2, 2) * torch.where(mixed, 4.0, 2.0)[:, None] / 20)
        if plain:
            level = torch.ones_like(level)
        audio = torch.zeros(streams, samples, device=self.device)
        present = torch.zeros(streams, samples, dtype=torch.bool, device=self.device)
        time = torch.arange(samples, device=self.device, dtype=torch.float32)
        for half in (0, 1):  # neighbours may overlap, so every second clip is placed at a time
            begins = start[:, half::2].contiguous()
            at = torch.searchsorted(begins, time.expand(streams, -1).contiguous(), right=True) - 1
            audible, at = at >= 0, at.clamp(min=0)

            def per_sample(x: Tensor, at: Tensor = at, half: int = half) -> Tensor:
                return torch.gather(x[:, half::2], 1, at)

            local = (time - per_sample(start)) * per_sample(rate)
            total = per_sample(self.length[clip])
            audible &= (local >= 0) & (local < total - 1)
            local = torch.where(per_sample(backwards), total - 1 - local, local).clamp(min=0)
            integer = local.floor()
            f = local - integer
            place = per_sample(self.offset[clip]) + torch.minimum(integer.long(), total - 1)
            a, b, c, d = (self.samples[(place + k).clamp(min=0)].float() for k in (-1, 0, 1, 2))
            value = b + 0.5 * f * (c - a + f * (2 * a - 5 * b + 4 * c - d + f * (3 * (b - c) + d - a)))
            audio += torch.where(audible, value / 32768 * per_sample(level), 0)
            present |= audible
        word_end = start[..., None] + ends
        word_start = torch.cat(((start + lead)[..., None], word_end[..., :-1]), -1)
        return audio, present, words.flatten(1), word_start.flatten(1), word_end.flatten(1)

    def targets(self, words: Tensor, start: Tensor, end: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the token of each frame and its weight, [streams, frames], and the frame of each word (or -1).

        A word's [STREAMING_WORD] is in the frame in which its end is DELAY frames old. Its pieces are in the next
        frames. If these frames are taken by the word before, the word is later. If the stream's beginning cuts off a
        part of a word, but not most of it, its frames have weight 0.
        """
        streams, outputs = len(words), frames - DELAY
        missing = (-start / (end - start).clamp(min=1)).clamp(0, 1)
        unclear = (words >= 0) & (missing > 0.12) & (missing < 0.6)
        said = (words >= 0) & (missing <= 0.12)
        frame = torch.floor((end - 160) / SAMPLES).long()
        tokens = self.table[torch.where(said, words, -1)]
        count = (tokens >= 0).sum(-1)
        before = torch.cumsum(count, 1) - count
        earliest = torch.where(said, frame - before, -(10**6))
        place = before + torch.cummax(earliest, 1).values
        target = torch.full((streams, outputs + PARTS), PAD, device=self.device)
        weight = torch.ones(streams, outputs + PARTS, device=self.device)
        fits = said & (place >= 0) & (place < outputs)
        for k in range(PARTS):
            valid = fits & (tokens[..., k] >= 0)
            row, column = valid.nonzero(as_tuple=True)
            target[row, (place + k)[row, column]] = tokens[..., k][row, column]
        row, column = (unclear & (frame < outputs)).nonzero(as_tuple=True)
        for k in range(-1, PARTS + 1):
            weight[row, (frame[row, column] + k).clamp(0, outputs)] = 0
        return target[:, :outputs], weight[:, :outputs], torch.where(fits, place, -1)

    def smooth(self, streams: int, bins: int, decibels: float, points: int = 14) -> Tensor:
        """Return a random gain that is smooth over logarithmic frequency: a factor for each bin, [streams, bins]."""
        curve = self.normal(streams, points) * decibels
        f = torch.arange(bins, device=self.device) / bins
        x = (1 + torch.log2(f.clamp(min=2**-7)) / 7) * (points - 1.001)
        i = x.long()
        return 10 ** (torch.lerp(curve[:, i], curve[:, i + 1], x - i) / 20)

    def disturb(self, audio: Tensor, present: Tensor) -> Tensor:
        """Return the augmented audio, [streams, samples]. `present`: where it is speech."""
        streams, samples = audio.shape
        spectrum = torch.fft.rfft(audio)
        bins = spectrum.shape[1]
        frequency = torch.arange(bins, device=self.device) * (RATE / 2 / (bins - 1))

        def maybe(chance: float) -> Tensor:
            return self.uniform(streams, 1) < chance

        def shape(band: Tensor, low: Tensor) -> Tensor:
            return torch.sigmoid((band - frequency) / 100) * torch.sigmoid((frequency - low) / 20)

        equal = torch.where(maybe(0.6), self.smooth(streams, bins, 4), 1.0)
        narrow, wide = self.uniform(streams, 1, low=3300, high=3950), self.uniform(streams, 1, low=4500, high=8500)
        band = torch.where(maybe(0.4), narrow, torch.where(maybe(0.4), wide, 9000.0))
        high_pass = torch.where(maybe(0.5), self.uniform(streams, 1, low=60, high=300), -200.0)
        n = RATE // 2
        decay = torch.exp(
            -6.9 * torch.arange(n, device=self.device) / RATE / self.uniform(streams, 1, low=0.1, high=0.5)
        )
        echo = self.normal(streams, n) * decay
        echo[:, :80] = 0
        ratio = self.uniform(streams, 1, low=3, high=16)  # of direct to reverberant energy, in dB
        echo = echo / echo.norm(dim=1, keepdim=True) * 10 ** (-ratio / 20)
        echo = torch.where(maybe(0.35), echo, 0.0)
        echo[:, 0] = 1
        filtered = equal * shape(band, high_pass)
        speech = torch.fft.irfft(spectrum * filtered * torch.fft.rfft(echo, n=samples), n=samples)

        power = (speech.square() * present).sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
        loud = power.sqrt().clamp(min=1e-4)
        # Background: coloured noise, mains hum, other streams at a distance. Its level changes over time.
        slope = torch.exp(-self.uniform(streams, 1) * torch.log1p(frequency / 60))
        colour = slope * self.smooth(streams, bins, 3) * torch.where(maybe(0.5), shape(band, high_pass), 1.0)
        noise = torch.fft.irfft(
            torch.complex(self.normal(streams, bins), self.normal(streams, bins)) * colour, n=samples
        )
        noise = noise / noise.square().mean(1, keepdim=True).sqrt()
        mains = self.uniform(streams, 1, low=48, high=62)
        time = torch.arange(samples, device=self.device) / RATE
        for k in range(1, 6):
            wave = torch.sin(2 * torch.pi * k * mains * time + 6.3 * self.uniform(streams, 1))
            noise += torch.where(maybe(0.15), 1.5 * self.uniform(streams, 1) / k, 0.0) * wave
        babble = sum((speech / loud).roll(k, 0).roll(k * samples // 7, 1) for k in (1, 2, 3, 5))
        noise += torch.where(maybe(0.12), self.uniform(streams, 1, low=0.2, high=0.8) * babble, 0.0)
        swell = F.interpolate(self.normal(streams, 1, 24), samples, mode="linear")[:, 0]
        noise *= 10 ** (swell * self.uniform(streams, 1, high=4) / 20)
        gate = F.max_pool1d(present[:, None].float(), 1601, 1, 800)[:, 0]  # as from a voice-activated microphone
        noise = torch.where(maybe(0.08), noise * gate, noise)
        snr = self.uniform(streams, 1, low=8, high=55)
        only = maybe(0.03)  # noise alone, however loud
        mix = torch.where(only, 0, speech) + torch.where(
            only, loud * noise, torch.where(maybe(0.82), loud * noise * 10 ** (-snr / 20), 0.0)
        )
        target = torch.where(
            maybe(0.8), self.uniform(streams, 1, low=-45, high=-14), self.uniform(streams, 1, low=-14, high=-3)
        )
        mix = mix / loud * 10 ** (target / 20)
        self.silenced = only[:, 0]
        return (mix * 32768).round().clamp(-32768, 32767) / 32768

    @torch.no_grad()
    def batch(self, streams: int, frames: int, plain: bool = False) -> Batch:
        """Return a batch. `plain`: without augmentation, with the words and their end times, for measuring."""
        audio, present, words, start, end = self.compose(streams, frames, plain)
        target, weight, place = self.targets(words, start, end, frames)
        if plain:
            audio = 0.25 * audio + 1e-4 * self.normal(*audio.shape)
            keep = place >= 0
            texts = [[WORDS[w] for w in words[i][keep[i]].tolist()] for i in range(streams)]
            ends = [[e / RATE for e in end[i][keep[i]].tolist()] for i in range(streams)]
            return Batch(audio, *features(audio, self.plain), target, weight, texts, ends)
        audio = self.disturb(audio, present)
        target = torch.where(self.silenced[:, None], PAD, target)
        weight = torch.where(self.silenced[:, None], 1.0, weight)
        warp = torch.where(self.uniform(streams) < 0.3, 0.5, self.uniform(streams))
        filters = self.filters[(warp * len(WARPS)).long()]
        return Batch(audio, *features(audio, filters), target, weight)
