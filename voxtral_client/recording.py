"""What was heard, kept in a file that grows while it is heard."""

import wave
from pathlib import Path

import numpy as np
import soundfile

from .audio import RATE, AudioError


class Recording:
    """A new WAV or FLAC file, 16 kHz mono PCM16.

    A WAV file is whole at any moment. A FLAC file whose process was killed lacks its length, which
    `ffmpeg -i` mends. Raises AudioError where it cannot be made; a file that is there is left alone.
    """

    def __init__(self, path: str | Path):
        self._path, kind, self._any = Path(path), Path(path).suffix.lower(), False
        if kind not in (".wav", ".flac"):
            raise AudioError(f"{path}: the name of a recording must end in .wav or .flac")
        try:
            self._file = open(path, "xb")  # noqa: SIM115
        except FileExistsError:
            raise AudioError(f"{path}: exists already; move it away or give another name") from None
        except OSError as error:
            raise AudioError(f"{path}: cannot be written ({error.strerror})") from None
        if kind == ".flac":
            self._audio = soundfile.SoundFile(self._file.fileno(), "w", RATE, 1, "PCM_16", format="FLAC", closefd=False)
        else:
            self._audio = wave.open(self._file, "wb")  # noqa: SIM115
            self._audio.setparams((1, 2, RATE, 0, "NONE", ""))

    def write(self, pcm: bytes) -> None:
        """Append PCM16 bytes. Raises OSError."""
        self._any = True
        if isinstance(self._audio, wave.Wave_write):
            self._audio.writeframes(pcm)  # brings the header up to date each time; libsndfile only when it closes
            return
        try:
            self._audio.write(np.frombuffer(pcm, "<i2"))
        except soundfile.LibsndfileError as error:
            raise OSError(error.error_string) from None

    def close(self) -> None:
        """Finish the file; an empty one would only be in the way. Raises OSError."""
        try:
            self._audio.close()
        finally:
            self._file.close()
        if not self._any:
            self._path.unlink()
