"""uvicorn, set up for this API."""

import socket

import uvicorn
from fastapi import FastAPI

from service.api.app import shutdown_of


class ApiServer(uvicorn.Server):
    """Ends the event streams first when it is told to stop, so that they do not keep it waiting."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, end what is being answered, and return."""
        app = self.config.app
        assert isinstance(app, FastAPI)
        shutdown_of(app).request()
        await super().shutdown(sockets)


def bind(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Return a socket that is bound, so that its port is known before it is served on.

    Args:
        host: address, IPv4 or IPv6.
        port: 0 for a free one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small writes at once only on sockets that name their protocol; an answer takes 40 ms longer else.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def api_server(app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, shutdown_grace_s: int = 5) -> ApiServer:
    """Return a server of the API; ``run(sockets=[...])`` serves on sockets that are already bound.

    Args:
        app: made by ``create_app``.
        host: address to listen on, where no socket is given.
        port: port to listen on; 0 for a free one.
        shutdown_grace_s: how long answers under way may take when the server stops.
    """
    return ApiServer(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,  # logging is the process's own affair
            access_log=False,
            ws="none",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=shutdown_grace_s,
        )
    )
