"""A TCP proxy that does to a WebSocket what networks do: cut, stall, refuse, close with a code."""

import asyncio
import socket
import struct


class Proxy:
    """Forward `url` to 127.0.0.1:`port`. After `frames` frames from the server, `fault` strikes, once.

    Faults: `reset` (RST to both sides), `stall` (nothing is forwarded any more, the connection stays
    open), `close` (a close frame 1011). `faults` is a list of (frames, fault), one for each connection.
    """

    def __init__(self, port: int, faults: list[tuple[int, str]] = (), delay: float = 0.0):
        self.target, self.faults, self.delay = port, list(faults), delay
        self.refusing = False  # accept nothing: as if no server were there
        self.struck: list[str] = []
        self.sessions = 0
        self._tasks: set[asyncio.Task] = set()
        self._ends: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}/v1/realtime"
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset all connections. May be called from any thread."""
        loop = self._server.get_loop()
        loop.call_soon_threadsafe(lambda: [reset(end) for end in self._ends])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        upstream = None
        try:
            if self.refusing:
                raise ConnectionRefusedError
            up_reader, upstream = await asyncio.open_connection("127.0.0.1", self.target)
            self._ends += writer, upstream
            self._connection = {"stalled": False}
            state = self._connection
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._forward(reader, upstream, state))
                tasks.create_task(self._return(up_reader, writer, state))
        except* (OSError, EOFError, asyncio.IncompleteReadError):
            pass
        finally:
            for end in (writer, upstream):
                if end is not None:
                    reset(end)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict) -> None:
        while data := await reader.read(65536):
            while state["stalled"]:
                await asyncio.sleep(3600)
            writer.write(data)
            await writer.drain()
        raise EOFError

    async def _return(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict) -> None:
        """Forward the server's HTTP reply, then its WebSocket frames one by one, counting them."""
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        if not head.startswith(b"HTTP/1.1 101"):
            while data := await reader.read(65536):
                writer.write(data)
            raise EOFError
        self.sessions += 1
        limit, fault = self.faults.pop(0) if self.faults else (None, "")
        count = 0
        while True:
            start = await reader.readexactly(2)
            length, extra = start[1] & 127, b""
            if length >= 126:
                extra = await reader.readexactly(2 if length == 126 else 8)
                length = int.from_bytes(extra)
            writer.write(start + extra + await reader.readexactly(length))
            await writer.drain()
            if self.delay:
                await asyncio.sleep(self.delay)
            count += 1
            if limit is not None and count >= limit:
                self.struck.append(fault)
                if fault == "close":
                    reason = struct.pack(">H", 1011) + b"keepalive ping timeout"
                    writer.write(bytes([0x88, len(reason)]) + reason)
                    await writer.drain()
                    await asyncio.sleep(0.5)
                elif fault == "stall":
                    state["stalled"] = True
                    await asyncio.sleep(3600)
                raise ConnectionResetError


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a host that went away and came back would."""
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
