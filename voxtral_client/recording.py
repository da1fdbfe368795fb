"""The microphone's audio in a file that grows while it is recorded."""

from pathlib import Path

import av
import numpy as np

from . import wav
from .errors import UserError
from .protocol import RATE


class Recording:
    """A new WAV or FLAC file, 16 kHz mono PCM16. Raises UserError where it cannot be made, or exists.

    A WAV file is valid at any moment; beyond 4 GiB (37 hours) it becomes RF64. A FLAC file whose process was killed
    lacks its length, but can be read. `error`: why it does not grow any more, one line.
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
        self._size, self._flac, self.error = 0, None, ""
        if kind == ".flac":
            self._flac = av.open(f"file:{path}", "w", "flac", options={"flush_packets": "1"})
            self._stream = self._flac.add_stream("flac", rate=RATE, layout="mono")

    def write(self, pcm: bytes) -> None:
        """Append PCM16 bytes, 16 kHz mono. After an error nothing more is written."""
        if self.error or not pcm:  # FFmpeg takes no empty block
            return
        try:
            if self._flac:
                block = av.AudioFrame.from_ndarray(np.frombuffer(pcm, "<i2")[None], "s16", "mono")
                block.sample_rate = RATE
                self._flac.mux(self._stream.encode(block))
            else:
                self._put(len(wav.header(0, RATE)) + self._size, pcm)
                self._put(0, wav.header(self._size + len(pcm), RATE))  # each time, so that it is valid
            self._size += len(pcm)
        except (OSError, av.error.FFmpegError) as error:
            self.error = f"{self._path}: {error.strerror}"

    def _put(self, position: int, data: bytes) -> None:
        self._file.seek(position)
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Finish the file, and remove it if it is empty: it would prevent the next run."""
        try:
            with self._file:
                if self._flac:
                    self._flac.mux(self._stream.encode(None))
                    self._flac.close()
            if not self._size:
                self._path.unlink()
        except (OSError, av.error.FFmpegError) as error:
            self.error = self.error or f"{self._path}: {error.strerror}"
