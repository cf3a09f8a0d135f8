"""The order in which a browser hears of closed streams and of new jobs, with a server and a browser whose every move is known."""

import asyncio
import json
from typing import Any

from st_ar.demo.serve import QUEUE, STREAM, JobsAfterClosing, Message

CLOSE = b'data: {"event_id":null,"msg":"close_stream"}\n\n'
DONE = b'data: {"event_id":"a","msg":"process_completed","output":{"data":["\\"msg\\":\\"close_stream\\""]}}\n\n'


async def gradio(scope: Message, receive: Any, send: Any) -> None:
    """Queues every job, and closes every stream after one message."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"].startswith(STREAM):
        for body in (DONE, CLOSE):
            await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Asked:
    """A request of a browser's, and what has come back so far."""

    def __init__(self, app: JobsAfterClosing, path: str, visitor: str) -> None:
        body = json.dumps({"data": [], "session_hash": visitor}).encode() if path == QUEUE else b""
        self.to_come: asyncio.Queue[Message] = asyncio.Queue()
        self.to_come.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.got: list[Message] = []
        scope = {"type": "http", "path": path, "query_string": f"session_hash={visitor}".encode()}
        self.served = asyncio.ensure_future(app(scope, self.to_come.get, self._take))

    async def _take(self, message: Message) -> None:
        self.got.append(message)

    def drop(self) -> None:
        self.to_come.put_nowait({"type": "http.disconnect"})

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.got if message["type"] == "http.response.body"]


async def settle() -> None:
    """Until nothing moves by itself."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_a_job_is_confirmed_when_the_browser_has_dropped_the_closed_stream() -> None:
    async def tell() -> None:
        app = JobsAfterClosing(gradio)
        stream = Asked(app, STREAM, "me")
        await settle()
        assert stream.bodies == [DONE, CLOSE]  # the answer's end waits
        mine, other = Asked(app, QUEUE, "me"), Asked(app, QUEUE, "you")
        await settle()
        assert (mine.got, other.bodies) == ([], [b""])
        stream.drop()
        await settle()
        assert (mine.bodies, stream.bodies) == ([b""], [DONE, CLOSE, b""])
        assert app.closing == {}
        later = Asked(app, QUEUE, "me")
        await settle()
        assert later.bodies == [b""]
        await asyncio.gather(*(asked.served for asked in (stream, mine, other, later)))

    asyncio.run(tell())


def test_a_browser_that_keeps_a_closed_stream_is_waited_for_a_while() -> None:
    async def tell() -> None:
        app = JobsAfterClosing(gradio, patience=0.05)
        stream, job = Asked(app, STREAM, "me"), Asked(app, QUEUE, "me")
        await settle()
        assert job.got == []
        await asyncio.gather(stream.served, job.served)
        assert (job.bodies, stream.bodies) == ([b""], [DONE, CLOSE, b""])

    asyncio.run(tell())


def test_requests_that_do_not_say_whose_they_are_are_passed_on() -> None:
    async def tell() -> None:
        app = JobsAfterClosing(gradio)
        stream = Asked(app, STREAM, "me")
        await settle()
        for body in (b"", b"{", b"[]", b"\xff", b"{}"):
            job = Asked(app, QUEUE, "")
            job.to_come.get_nowait()
            job.to_come.put_nowait({"type": "http.request", "body": body, "more_body": False})
            await job.served
            assert job.bodies == [b""]
        stream.drop()
        await stream.served

    asyncio.run(tell())
