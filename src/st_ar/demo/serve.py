"""The demo's web page and its server."""

import asyncio
import contextlib
import ipaddress
import os
import re
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from st_ar.demo import html
from st_ar.demo.inputs import MOST_BYTES
from st_ar.demo.models import ModelPool
from st_ar.demo.runs_tab import runs_tab
from st_ar.demo.setup import Setup
from st_ar.demo.tabs import compare_tab, generate_tab, gr
from st_ar.demo.understand_tab import understand_tab
from st_ar.errors import Interrupted, UserError, require
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


TITLE = "st-ar"
WAITING = 32
"""Jobs that may wait in line; more are refused."""
FORGET = 3600
"""Seconds after which files of the page's pictures and uploads are removed."""


def describe(shelf: ModelPool) -> str:
    """The weights that the page offers, those of one shape together, and what draws with them."""
    shapes: dict[str, list[str]] = {}
    for name in shelf.names:
        config = shelf.find(name).config
        shape = f"{config.n_layers} layers of {config.dim}, {config.grid} x {config.grid} tokens"
        shapes.setdefault(shape, []).append(name)
    models = [f"{', '.join(names)}: {shape}" for shape, names in shapes.items()]
    return "; ".join([*models, f"{shelf.device.type}, {str(shelf.dtype).removeprefix('torch.')}"])


def build_page(setup: Setup) -> Any:
    """The page as Gradio's Blocks, with a queue."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(FORGET, FORGET)) as page:
        gr.HTML(f"<h1>{TITLE}</h1>{html.note(describe(setup.shelf))}", elem_id="head")
        drawn = gr.State(None, time_to_live=FORGET)
        with gr.Tab("Generate"):
            generate_tab(setup, drawn)
        with gr.Tab("Compare"):
            compare_tab(setup)
        with gr.Tab("Understand"):
            understand_tab(setup, drawn)
        with gr.Tab("Runs"):
            runs_tab(setup)
    return page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def style() -> dict[str, Any]:
    """Theme and style sheet, as Gradio takes them when the page is mounted: fonts that every machine has, nothing from elsewhere."""
    theme = gr.themes.Default(
        primary_hue="sky", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return {"theme": theme, "css": files("st_ar").joinpath("templates/demo.css").read_text()}


SERVED = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|assets/.*|static/.*|svelte/.*"
    r"|gradio_api/(startup-events|app_id|token|info|theme\.css|heartbeat/.*|queue/(join|data)|cancel|reset|upload|upload_progress"
    r"|file=(?!\w+:).*))?/?"
)
"""What of Gradio's server the page needs: nothing else of it answers."""
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""The browser itself refuses whatever would leave for another host."""
MOST_BODY = MOST_BYTES + (1 << 20)
"""Bytes of a request."""


class Guard:
    """Around the page's server: other paths, other hosts' names and larger requests are refused; HEADERS are added.

    Args:
        hosts: names by which the page may be called; any, if None. A page elsewhere could give its own name this machine's
            address, and would be let in otherwise.
    """

    def __init__(self, app: App, hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Message, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            status, text = refusal
            start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]}
            await send(start)
            await send({"type": "http.response.body", "body": text.encode()})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                kept = [pair for pair in message["headers"] if pair[0].lower().decode() not in HEADERS]
                message = {**message, "headers": [*kept, *ours]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self.hosts is not None and _hostname(headers.get("host", "")) not in self.hosts:
            return 421, "this page answers to localhost alone"
        if not SERVED.fullmatch(scope["path"]):
            return 404, "there is nothing here"
        if "transfer-encoding" in headers:
            return 411, "a request must say how long it is"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BODY:
            return 413, f"more than {MOST_BODY} bytes"
        return None


def _hostname(host: str) -> str:
    """Without the port."""
    return re.sub(r":\d+$", "", host).strip("[]").lower()


def is_local(host: str) -> bool:
    """Whether an address is this machine's own, that no other can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_gradio() -> Any:
    """The module, which tells nobody that it is used; UserError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: it asks then
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(
        1 << 31
    )  # events between its statistics, which nobody sees here
    return require("gradio")


def build_app(setup: Setup, host: str) -> Any:
    """The page's server as an ASGI application."""
    gradio = require_gradio()
    from fastapi import FastAPI

    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def mount() -> Any:
        return gradio.mount_gradio_app(
            outer,
            build_page(setup),
            path="/",
            server_name=host,
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=MOST_BYTES,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            **style(),
        )

    with ThreadPoolExecutor(1) as thread:  # outside of an event loop Gradio makes some that nobody closes
        mounted = thread.submit(lambda: asyncio.run(mount())).result()
    return Guard(JobsAfterClosing(mounted), frozenset({"localhost", "127.0.0.1", "::1"}) if is_local(host) else None)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one.

    Raises:
        UserError: the port is taken, or no such address is this machine's.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port must lie between 0 (any that is free) and 65535, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise UserError(
            f"cannot serve on {host}, port {port}: {error.strerror or error}; give another --port (0 takes a free one) or --host"
        ) from error
    return listening


def make_server(setup: Setup, host: str) -> Any:
    """A uvicorn server of the page; it is given the socket when it is run."""
    app = build_app(setup, host)
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False, ws="none")
    )


@contextlib.contextmanager
def private_folder() -> Generator[None]:
    """Within the block Gradio keeps what visitors upload and see in a folder that no other user can read; it is removed at the end.

    To be entered before Gradio is imported.
    """
    with tempfile.TemporaryDirectory(prefix="st-ar-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def serve(setup: Setup, host: str, port: int) -> None:
    """Serve the page until a signal ends it.

    Raises:
        Interrupted: by SIGTERM. (SIGINT raises KeyboardInterrupt.)
    """
    listening = bind(host, port)
    # The server passes signals on to these when it has closed. A shell's background jobs would ignore SIGINT.
    ours = {signal.SIGTERM: _end, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    try:
        server = make_server(setup, host)
        listening.listen()  # who comes before the server has begun waits for it
        name = "localhost" if is_local(host) else host
        print(f"the page is at http://{name}:{listening.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        setup.shelf.close()


def _end(signum: int, _frame: object) -> None:
    raise Interrupted("the page is closed", signum)
