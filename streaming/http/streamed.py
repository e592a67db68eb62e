"""An answer that is sent piece by piece while it is made."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from streaming.http.connection import ClientGone, while_connected
from streaming.http.errors import ApiError, as_api_error

_log = logging.getLogger(__name__)


class Streamed(Response):
    """Sends what `pieces` yields.

    The headers wait for the first piece, so that an error up to there still gets a status of its own. `late_headers` is
    called then. `pieces` is closed at once when the client disconnects.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
        late_headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._pieces = pieces
        self._late_headers = late_headers
        self._begun = False

    def ending(self, error: ApiError | None) -> bytes | None:
        """What is sent after the last piece, or after an error. None breaks the connection off: so the client knows."""
        return b"" if error is None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        except ClientGone:
            if not self._begun:  # else an answer has been counted, and there can be no other
                raise

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._pieces) as pieces:
            piece = await anext(pieces, b"")
            self.headers.update(self._late_headers())
            self._begun = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                ending = self.ending(None)
            except Exception as error:  # whatever it is, a stream that has begun must end as one
                shown = as_api_error(error)
                if shown.code == "internal_error":
                    _log.exception("a stream failed")
                ending = self.ending(shown)
            if ending is not None:
                await send({"type": "http.response.body", "body": ending, "more_body": False})
