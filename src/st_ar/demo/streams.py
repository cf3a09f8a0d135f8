"""The streams in which Gradio tells browsers of their jobs, and what keeps a job from being lost while one ends.

Gradio's server closes a visitor's stream with a last message when none of the visitor's jobs is left; the browser opens another with its
next job, unless it takes the last one for open still. So a job that is queued just then would never be heard of, if its confirmation
came before that message was read: what one clicks on as the last answer comes would hang. Here the confirmation waits until the browser has
dropped the closed stream, as it does when it has read the message.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from st_ar.files import parse_json

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[..., Any], Callable[..., Any]], Awaitable[None]]

STREAM, QUEUE = "/gradio_api/queue/data", "/gradio_api/queue/join"
CLOSED = b'"msg":"close_stream"'
"""Of a stream's last message; in a text it would have backslashes."""
PATIENCE = 30.0
"""Seconds after which a browser that has not dropped a closed stream is gone, or of another kind."""


class JobsAfterClosing:
    """Around Gradio's server: a visitor's job is confirmed when the visitor's browser knows that its last stream is closed."""

    def __init__(self, app: App, patience: float = PATIENCE) -> None:
        self.app, self.patience = app, patience
        self.closing: dict[str, asyncio.Event] = {}
        """By visitor; set when the browser knows."""

    async def __call__(self, scope: Message, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        serve = {STREAM: self._stream, QUEUE: self._queue}.get(path, self.app)
        await serve(scope, receive, send)

    async def _stream(self, scope: Message, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        visitor = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[-1]
        known, ended = asyncio.Event(), False

        async def send_open(message: Message) -> None:
            nonlocal ended
            if ended:  # all that follows is the end of the answer
                return
            if ended := CLOSED in message.get("body", b""):
                self.closing[visitor] = known
            await send(message)

        try:
            await self.app(scope, receive, send_open)
            if ended:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.patience):
                        while (await receive())["type"] != "http.disconnect":
                            pass
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            known.set()
            if self.closing.get(visitor) is known:
                del self.closing[visitor]

    async def _queue(self, scope: Message, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        body = bytearray()

        async def read() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def confirm(message: Message) -> None:
            if message["type"] == "http.response.start" and (known := self.closing.get(_visitor(body))):
                await known.wait()
            await send(message)

        await self.app(scope, read, confirm)


def _visitor(body: bytearray) -> str:
    """Whose job it is; nobody's, if the request does not say."""
    try:
        job = parse_json(body.decode())
    except ValueError:
        return ""
    return str(job.get("session_hash", "")) if isinstance(job, dict) else ""
