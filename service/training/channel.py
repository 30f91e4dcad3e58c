"""The connection of a training process to its rank actor: JSON lines over a socket pair."""

import select
import socket
import time
from contextlib import suppress

from service.domain.journal import Report
from service.domain.rank_protocol import RankMessage, StopRequest
from service.training.errors import ChannelClosed

SEND_TIMEOUT_S = 60.0  # a rank actor that reads nothing for this long is taken for gone
# How long metrics may wait for others to be sent with: a short step would wake its readers hundreds of times a second.
GATHER_S = 0.05
_RECEIVE_BYTES = 1 << 16


class Channel:
    """Sends messages in order; looks for requests without waiting.

    Args:
        fd: a connected stream socket, taken over.
    """

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.settimeout(SEND_TIMEOUT_S)
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._received = b""
        self._waiting: list[bytes] = []
        self._waiting_since = 0.0
        self._stop_requested = False

    def close(self) -> None:
        """Hang up; what still waits to be sent is sent first, if it can be."""
        with suppress(ChannelClosed):
            self._flush()
        self._socket.close()

    def send(self, message: RankMessage | Report) -> None:
        """Send a message.

        Raises:
            ChannelClosed: nobody reads it.
        """
        self._waiting.append(message.model_dump_json().encode() + b"\n")
        self._flush()

    def send_soon(self, message: RankMessage | Report) -> None:
        """Send a message together with those that come soon after it, in order with all others.

        Raises:
            ChannelClosed: nobody reads them.
        """
        if not self._waiting:
            self._waiting_since = time.monotonic()
        self._waiting.append(message.model_dump_json().encode() + b"\n")
        if time.monotonic() - self._waiting_since >= GATHER_S:
            self._flush()

    def stop_requested(self) -> bool:
        """Read what has arrived, and say whether a stop was ever asked for; sends what has waited long enough.

        Raises:
            ChannelClosed: the other end is closed.
        """
        if self._waiting and time.monotonic() - self._waiting_since >= GATHER_S:
            self._flush()
        while self._readable.poll(0):
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except OSError as error:
                raise ChannelClosed(f"the rank actor is gone: {error}") from error
            if not data:
                raise ChannelClosed("the rank actor is gone: end of file")
            *lines, self._received = (self._received + data).split(b"\n")
            for line in lines:
                StopRequest.model_validate_json(line)  # the only request there is
                self._stop_requested = True
        return self._stop_requested

    def _flush(self) -> None:
        lines, self._waiting = self._waiting, []
        try:
            self._socket.sendall(b"".join(lines))
        except OSError as error:
            raise ChannelClosed(f"the rank actor does not read: {error}") from error
