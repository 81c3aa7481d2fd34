"""What a link carries, seen from plain TCP sockets: every rank sends to the next one, all at once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence

PORT = 29400
_CHUNK = 2**18
_PATIENCE = 60.0


class Ring:
    """Connections to the next rank and from the previous one.

    Args:
        rank: this rank.
        addresses: IPv4 addresses by rank.
    """

    def __init__(self, rank: int, addresses: Sequence[str]) -> None:
        with socket.create_server((addresses[rank], PORT)) as server:
            server.settimeout(_PATIENCE)
            self._next = _connect(addresses[(rank + 1) % len(addresses)])
            self._previous, _ = server.accept()
        self._previous.settimeout(_PATIENCE)

    def transfer(self, count: int) -> float:
        """Send and receive; every rank must call it.

        Args:
            count: bytes.

        Returns:
            Seconds until all have arrived here.

        Raises:
            ConnectionError: the previous rank has gone.
        """
        start = time.perf_counter()
        sender = threading.Thread(target=self._send, args=(count,))
        sender.start()
        buffer, left = bytearray(_CHUNK), count
        while left:
            got = self._previous.recv_into(buffer, min(left, _CHUNK))
            if got == 0:
                raise ConnectionError("the previous rank has gone")
            left -= got
        seconds = time.perf_counter() - start
        sender.join()
        return seconds

    def close(self) -> None:
        """Close the connections."""
        self._next.close()
        self._previous.close()

    def _send(self, count: int) -> None:
        chunk = memoryview(bytes(_CHUNK))
        for start in range(0, count, _CHUNK):
            self._next.sendall(chunk[: min(count - start, _CHUNK)])


def _connect(address: str) -> socket.socket:
    """Connect as soon as the other rank listens."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            end = socket.create_connection((address, PORT), _PATIENCE)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return end
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
