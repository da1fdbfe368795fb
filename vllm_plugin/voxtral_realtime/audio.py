"""What clients send as audio: decoded, and resampled to the model's 16 kHz without seams."""

import numpy as np
import soxr

from voxtral_client.protocol import RATE

LOWEST_RATE, HIGHEST_RATE = 8_000, 48_000


def _mu_law() -> np.ndarray:
    """Return the samples of the 256 codes of ITU-T G.711 µ-law."""
    code = 255 - np.arange(256)
    magnitude = ((((code & 15) << 3) + 132) << (code >> 4 & 7)) - 132
    return np.where(code & 128, -magnitude, magnitude).astype("<i2")


def _a_law() -> np.ndarray:
    """Return the samples of the 256 codes of ITU-T G.711 A-law."""
    code = np.arange(256) ^ 0x55
    segment, step = code >> 4 & 7, ((code & 15) << 4) + 8
    magnitude = np.where(segment == 0, step, (step + 256) << np.maximum(segment - 1, 0))
    return np.where(code & 128, magnitude, -magnitude).astype("<i2")


# For each encoding: the type of a value, and how an array of them becomes PCM16.
ENCODINGS = {
    "pcm_s16le": ("<i2", lambda values: values),
    "pcm_mulaw": ("u1", _mu_law().take),
    "pcm_alaw": ("u1", _a_law().take),
}


class Intake:
    """Turns one format of audio into PCM16 bytes at 16 kHz. `seconds`: how much came in so far."""

    def __init__(self, encoding: str, rate: int):
        self.encoding, self.rate = encoding, rate
        self._kind, self._convert = ENCODINGS[encoding]
        self._resampler = self._new()

    def _new(self) -> soxr.ResampleStream | None:
        return None if self.rate == RATE else soxr.ResampleStream(self.rate, RATE, 1, dtype="int16")

    def decode(self, data: bytes) -> tuple[float, bytes]:
        """Return the seconds of audio in `data`, and what it adds at 16 kHz. Raises ValueError: part of a sample."""
        samples = self._convert(np.frombuffer(data, self._kind))
        seconds = len(samples) / self.rate
        if self._resampler:
            samples = self._resampler.resample_chunk(samples)
        return seconds, samples.tobytes()

    def finish(self) -> bytes:
        """Return what the resampler holds back; what follows is new audio."""
        if not self._resampler:
            return b""
        rest = self._resampler.resample_chunk(np.zeros(0, "<i2"), last=True).tobytes()
        self._resampler = self._new()
        return rest
