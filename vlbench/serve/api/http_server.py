"""The server's process: its socket, its limits, and how it ends.

The first SIGTERM or Ctrl-C lets answers that were accepted end, while new requests get 503; the
second one ends at once.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from vlbench.compat.uvicorn_internals import limited_protocol
from vlbench.errors import UserError
from vlbench.serve.api.api_errors import ApiError
from vlbench.serve.api.api_settings import ApiSettings
from vlbench.serve.api.api_state import ApiState

KEEP_ALIVE_SECONDS = 30
FLUSH_SECONDS = 5  # for the last bytes of responses, at the end
INTERRUPTED = 130  # exit code, as of every verb that is ended


class ApiServer(uvicorn.Server):
    """uvicorn, which ends as the module says."""

    def __init__(self, app: FastAPI, settings: ApiSettings) -> None:
        """Serve an application of `create_app`."""
        super().__init__(
            uvicorn.Config(
                app,
                http=limited_protocol(
                    settings.max_connections,
                    settings.header_seconds,
                    settings.stall_seconds,
                    bytes(ApiError(400, "the request is no HTTP").to_response().body),
                ),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=settings.max_header_bytes,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self._state: ApiState = app.state.api
        self._drain_seconds = settings.drain_seconds
        self.exit_code = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end at the first signal, and end at the second; uvicorn calls this for each."""
        if not self._state.is_draining:
            self.begin_drain()
            return
        self.exit_code = INTERRUPTED
        self.end_now()

    def begin_drain(self) -> None:
        """Accept no more requests; end when those that were accepted are answered."""
        self._state.is_draining = True
        threading.Thread(target=self._drain_engines, name="drain", daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; responses that are cut off now are no faults to be told with a stack trace."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)

    def end_now(self) -> None:
        """End, answers too."""
        self.should_exit = self.force_exit = True

    def _drain_engines(self) -> None:
        deadline = time.monotonic() + self._drain_seconds
        for model in self._state.models.values():
            model.engine.drain(max(0.0, deadline - time.monotonic()))
        self.should_exit = True

    def close_engines(self) -> None:
        """End the engines' threads."""
        for model in self._state.models.values():
            model.engine.close()


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket to listen on; a UserError where the port is in use or the host unknown."""
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"host={host} is no address of this machine ({error})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"cannot listen on {host}, port {port} ({reason}); say port=N") from None
    return listener
