"""The microphone's audio in a file that grows while it is recorded."""

from pathlib import Path

import numpy as np
import soundfile

from . import UserError, wav
from .protocol import RATE


class Recording:
    """A new WAV or FLAC file, 16 kHz mono PCM16. Raises UserError where it cannot be made, or exists.

    A WAV file is valid at any moment; beyond 4 GiB (37 hours) it becomes RF64. A FLAC file whose process was killed
    lacks its length, but can be read.
    """

    def __init__(self, path: str | Path):
        self._path, kind = Path(path), Path(path).suffix.lower()
        if kind not in (".wav", ".flac"):
            raise UserError(f"{path}: the name of a recording must end in .wav or .flac")
        try:
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        except FileExistsError:
            raise UserError(f"{path}: exists already; move it away or give another name") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        self._size, self._flac = 0, None
        if kind == ".flac":
            self._flac = soundfile.SoundFile(self._file.fileno(), "w", RATE, 1, "PCM_16", format="FLAC", closefd=False)

    def write(self, pcm: bytes) -> None:
        """Append PCM16 bytes, 16 kHz mono. Raises OSError."""
        if self._flac:
            try:
                self._flac.write(np.frombuffer(pcm, "<i2"))
            except soundfile.LibsndfileError as error:
                raise OSError(error.error_string) from None
        else:
            self._put(len(wav.header(0, RATE)) + self._size, pcm)
            self._put(0, wav.header(self._size + len(pcm), RATE))  # each time: libsndfile does so only at the end
        self._size += len(pcm)

    def _put(self, position: int, data: bytes) -> None:
        self._file.seek(position)
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Finish the file, and remove it if it is empty: it would prevent the next run. Raises OSError."""
        try:
            if self._flac:
                self._flac.close()
        finally:
            self._file.close()
        if not self._size:
            self._path.unlink()
