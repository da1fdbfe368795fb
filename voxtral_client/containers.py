"""A file as PyAV reads it: one recording at a time, of those that are joined in it."""

import errno
import io
import mmap
import os
import re
import stat

import av

from . import wav
from .errors import AudioError

# What begins a recording in containers that FFmpeg reads no further than their index says: where its first part is,
# which bytes of a part are its size, and how many bytes are not in that. `cat a.m4a b.m4a` joins two.
PARTS = {
    rb"\0\0\0.ftyp": (0, slice(0, 4), "big", 0),
    rb"FLV\x01.\0\0\0\t": (13, slice(1, 4), "big", 15),
    rb"FORM....AIF[FC]": (0, slice(4, 8), "big", 8),
    rb"caff\0\x01\0\0": (8, slice(4, 12), "big", 12),
    rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb": (0, slice(16, 24), "little", 0),  # W64
    rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa": (0, slice(16, 24), "little", 0),  # ASF: WMA, WMV
}
TTA = b"TTA1\1\0"
# Audio without any header, by the ending of its name. Its usual rate is that of a telephone.
TELEPHONE = {".ul": "mulaw", ".ulaw": "mulaw", ".al": "alaw", ".alaw": "alaw", ".sln": "s16le", ".sw": "s16le",
             ".uw": "u16le", ".sb": "s8", ".ub": "u8"}  # fmt: skip
TELEPHONE_RATE = 8000


def samples(form: str, rate: int, channels: int = 1) -> dict:
    """Return what av.open needs for samples without a header, whose `form` is one of FFmpeg's names."""
    return {"format": form, "options": {"sample_rate": str(rate), "ch_layout": f"{channels}c", "probesize": "32"}}


class Bytes:
    """An open file as PyAV reads it: one recording at a time, of WAV its samples only."""

    def __init__(self, file: io.FileIO, name: str):
        """`name`: FFmpeg recognizes a few formats by their ending only."""
        self.name, self._file = name, file
        self.close = file.close
        self.head = b""  # bytes read from the file, but not yet by PyAV
        self.size: int | None = None  # bytes of samples, by WAV's header
        self._left: int | None = None  # of them
        self.on_disk = stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.tell() == 0
        self._seekable = self.on_disk
        self._begin, self._end = 0, os.fstat(file.fileno()).st_size  # of the recording, in a file on disk

    def begin(self) -> dict:
        """Read a header of WAV, if there is one. Return what av.open needs to read the rest.

        Raises AudioError for an empty file, FFmpegError for a bad header.
        """
        head, size = wav.read_header(self._take)
        if not head:
            raise AudioError(f"{self.name}: is empty")
        self.size = self._left = size or None
        if size is not None:
            self._seekable = False
            with av.open(io.BytesIO(head), format="wav") as header:
                codec = header.streams.audio[0].codec_context
                if codec.name.startswith("pcm_"):
                    return samples(codec.name.removeprefix("pcm_"), codec.sample_rate, codec.channels)
        if self._seekable:
            self._end = self._joint(head)
            self._file.seek(self._begin)
        else:
            self.head = head  # FFmpeg needs it
        return {} if size is None else {"options": {"ignore_length": "1"}}

    def next(self) -> bool:
        """Go to the recording that follows; return False where there is none."""
        if self._seekable:
            self._begin, self._end = self._end, os.fstat(self._file.fileno()).st_size
            self._file.seek(self._begin)
            return self._begin < self._end
        return self.head[:4] in wav.FORMS

    def _joint(self, head: bytes) -> int:
        """Return where the recording ends by the sizes of its parts, if another begins there, else the file's end."""
        if head.startswith(TTA):  # its sizes follow its header; few files are so rare and so small
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                at = data.find(TTA, self._begin + 1)
            return at if at > 0 else self._end
        magic = next((magic for magic in PARTS if re.match(magic, head, re.DOTALL)), None)
        at, size, order, more = PARTS.get(magic, (0, slice(0), "big", 0))
        at += self._begin
        while magic and self._file.seek(at) < self._end:
            part = self._file.read(24)
            if at > self._begin and re.match(magic, part, re.DOTALL):
                return at
            length = int.from_bytes(part[size], order) + more
            if length == 1:
                length = int.from_bytes(part[8:16], "big")
            if length < 8:
                break
            at += length
        return self._end

    def rest(self) -> int:
        """Return the number of bytes from here to the end of a file on disk."""
        return os.fstat(self._file.fileno()).st_size - self._file.tell()

    def frames(self) -> int | None:
        """Return the number of frames by the header of an MP3 file, if it has one: FFmpeg may estimate the duration."""
        if not self._seekable:
            return None
        here = self._file.tell()
        self._file.seek(0)
        head = self._file.read(10)
        tag = 10 + sum((byte & 127) << 7 * (3 - n) for n, byte in enumerate(head[6:10]))
        self._file.seek(tag if head.startswith(b"ID3") else 0)
        head = self._file.read(2048)
        self._file.seek(here)
        at = max(head.find(b"Xing"), head.find(b"Info"))
        return int.from_bytes(head[at + 8 : at + 12]) if at >= 0 and head[at + 7] & 1 else None

    def seekable(self) -> bool:
        """May FFmpeg seek? PyAV calls this. Films may have their index at the end."""
        return self._seekable

    def tell(self) -> int:
        """Return the position in the recording. PyAV calls this."""
        return self._file.tell() - self._begin

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position in the recording and return it. PyAV calls this."""
        at = offset + {os.SEEK_SET: self._begin, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._end}[whence]
        return self._file.seek(at) - self._begin if at >= self._begin else -errno.EINVAL

    def read(self, count: int) -> bytes:
        """Return the next bytes, `count` at most; none at the end. PyAV calls this."""
        if self._left == 0:  # by the header, which may be wrong
            self.head = self.head or self._take(8)
            if wav.is_chunk(self.head):
                return b""
            self._left = None
        if self.head:
            data, self.head = self.head[:count], self.head[count:]
            return data
        left = max(0, self._end - self._file.tell()) if self._seekable else self._left
        data = self._file.read(count if left is None else min(count, left))
        if self._left is not None:
            self._left -= len(data)
        return data

    def _take(self, count: int) -> bytes:
        """Read `count` bytes, fewer only at the end."""
        data, self.head = self.head[:count], self.head[count:]
        while len(data) < count and (more := self._file.read(count - len(data))):
            data += more
        return data
