"""The headers of WAV files, read and written: https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/WAVE/WAVE.html

They are read here, because FFmpeg relies on the lengths in them, which are wrong after a recorder was killed, and
because it buffers 64 KiB of a stream before it yields audio. A file of more than 4 GiB is RF64 (EBU Tech 3306).
"""

import struct
from collections.abc import Callable

UNKNOWN = 0x7F00_0000  # bytes; programs that write into a pipe put this length, or a larger one, into the header
FORMS = (b"RIFF", b"RF64")  # the first four bytes of a file
LONGEST_CHUNK = 1 << 26  # bytes; no chunk of metadata is longer


def read_header(take: Callable[[int], bytes]) -> tuple[bytes, int | None]:
    """Read up to the first sample. Return the bytes read, and how many bytes of samples follow by the header.

    That number is 0 where the header does not give it, and None where this is not WAV.
    `take(n)` returns the next n bytes, fewer at the end.
    """
    head, long_size = take(12), 0
    if head[:4] not in FORMS or head[8:] != b"WAVE":
        return head, None
    while len(start := take(8)) == 8:
        head += start
        name, size = start[:4], int.from_bytes(start[4:], "little")
        if name == b"data":
            return head, long_size if size == 0xFFFF_FFFF else size
        if size > LONGEST_CHUNK:
            break
        head += (chunk := take(size + size % 2))
        if name == b"ds64":
            long_size = int.from_bytes(chunk[8:16], "little")
    return head, None


def is_chunk(start: bytes) -> bool:
    """Do these 8 bytes after the samples begin another chunk, or end the file? Otherwise they are samples."""
    return len(start) < 8 or (start[:4].isascii() and start[:4].decode().isprintable()
                              and int.from_bytes(start[4:], "little") < LONGEST_CHUNK)  # fmt: skip


def header(size: int, rate: int) -> bytes:
    """Return a header of 80 bytes for `size` bytes of mono PCM16; beyond 4 GiB it has RF64's sizes in place of JUNK."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    if size + 72 < 1 << 32:
        riff = struct.pack("<4sI4s4sI28x", b"RIFF", size + 72, b"WAVE", b"JUNK", 28)
        return riff + form + struct.pack("<4sI", b"data", size)
    sizes = struct.pack("<4sIQQQI", b"ds64", 28, size + 72, size, size // 2, 0)
    riff, data = (b"RF64", 0xFFFF_FFFF, b"WAVE"), (b"data", 0xFFFF_FFFF)
    return struct.pack("<4sI4s", *riff) + sizes + form + struct.pack("<4sI", *data)
