"""The demo's server."""

import asyncio
import contextlib
import ipaddress
import re
import signal
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from st_ar.demo import html
from st_ar.demo.inputs import MAX_BYTES
from st_ar.demo.models import ModelPool
from st_ar.demo.runs_tab import runs_tab
from st_ar.demo.setup import Setup
from st_ar.demo.tabs import compare_tab, generate_tab, gr
from st_ar.demo.understand_tab import understand_tab
from st_ar.errors import Interrupted, UserError
from st_ar.files import parse_json

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

STREAM_PATH, JOIN_PATH = "/gradio_api/queue/data", "/gradio_api/queue/join"
CLOSE_MESSAGE = b'"msg":"close_stream"'
"""Part of a stream's last message. In user text the quotes would be escaped."""
CLOSE_TIMEOUT = 30.0
"""Seconds to wait for a browser to close its stream."""


class StreamCloseBarrier:
    """ASGI middleware around Gradio's server that works around a race in Gradio 6.31.

    A browser receives the results of all its jobs over one stream. When the last job ends, the server sends `close_stream` and
    forgets the stream. If the visitor starts a job before the browser has handled that message, the browser still expects the
    result on the old stream, and the job is never answered. Therefore this class keeps the stream's response open until the
    browser disconnects, and delays the confirmation of a new job until then. The browser opens a new stream after it.
    """

    def __init__(self, app: App, timeout: float = CLOSE_TIMEOUT) -> None:
        self.app, self.timeout = app, timeout
        self.closing: dict[str, asyncio.Event] = {}
        """Session -> set when the browser has closed its stream."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        await {STREAM_PATH: self._stream, JOIN_PATH: self._join}.get(path, self.app)(scope, receive, send)

    async def _stream(self, scope: Message, receive: Receive, send: Send) -> None:
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[-1]
        closed, closing = asyncio.Event(), False

        async def send_until_close(message: Message) -> None:
            nonlocal closing
            if closing:  # the end of the response, which is sent below
                return
            if closing := CLOSE_MESSAGE in message.get("body", b""):
                self.closing[session] = closed
            await send(message)

        try:
            await self.app(scope, receive, send_until_close)
            if closing:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.timeout):
                        while (await receive())["type"] != "http.disconnect":
                            pass
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            closed.set()
            if self.closing.get(session) is closed:
                del self.closing[session]

    async def _join(self, scope: Message, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def read() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def confirm(message: Message) -> None:
            if message["type"] == "http.response.start" and (closed := self.closing.get(_session(body))):
                await closed.wait()
            await send(message)

        await self.app(scope, read, confirm)


def _session(body: bytearray) -> str:
    """The session of a job; empty if the request does not name one."""
    try:
        job = parse_json(body.decode())
    except ValueError:
        return ""
    return str(job.get("session_hash", "")) if isinstance(job, dict) else ""


TITLE = "st-ar"
MAX_QUEUE = 32
"""Largest number of waiting jobs; more are refused."""
FILE_LIFETIME = 3600
"""Seconds after which images and uploads are deleted."""


def describe(pool: ModelPool) -> str:
    """Return the demo's weights, grouped by model shape, with the device and type."""
    shapes: dict[str, list[str]] = {}
    for name in pool.names:
        config = pool.find(name).config
        shape = f"{config.n_layers} layers of width {config.dim}, {config.grid} x {config.grid} tokens"
        shapes.setdefault(shape, []).append(name)
    models = [f"{', '.join(names)}: {shape}" for shape, names in shapes.items()]
    return "; ".join([*models, f"{pool.device.type}, {str(pool.dtype).removeprefix('torch.')}"])


def build_page(setup: Setup) -> Any:
    """Return the demo as Gradio Blocks with a queue."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(FILE_LIFETIME, FILE_LIFETIME)) as page:
        gr.HTML(f"<h1>{TITLE}</h1>{html.note(describe(setup.pool))}", elem_id="head")
        generated = gr.State(None, time_to_live=FILE_LIFETIME)
        with gr.Tab("Generate"):
            generate_tab(setup, generated)
        with gr.Tab("Compare"):
            compare_tab(setup)
        with gr.Tab("Understand"):
            understand_tab(setup, generated)
        with gr.Tab("Runs"):
            runs_tab(setup)
    return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1, api_open=False)


ALLOWED_PATHS = re.compile(
    r"/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|assets/.*|static/.*|svelte/.*"
    r"|gradio_api/(startup-events|app_id|token|info|theme\.css|heartbeat/.*|queue/(join|data)|cancel|reset|upload|upload_progress"
    r"|file=(?!\w+:).*))?/?"
)
"""Paths of Gradio's server that the demo needs. All others are refused."""
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Headers that make the browser refuse requests to other hosts."""
REPLACED = re.compile(f"({'|'.join(HEADERS)})$|access-control-")
"""Gradio's headers that are left out. With another host name than localhost, Gradio lets every website read the answers."""
MAX_BODY = MAX_BYTES + (1 << 20)
"""Largest size of a request in bytes. Gradio limits only uploads."""


class Guard:
    """ASGI middleware that refuses other paths, large requests and host names other than `hosts` (None allows any), and adds HEADERS.

    Otherwise a website could point its own name at this machine's address (DNS rebinding) and use the demo from a visitor's browser.
    `prefix` is the path under which a reverse proxy serves the demo. Proxies may strip it or not.
    """

    def __init__(self, app: App, hosts: frozenset[str] | None, prefix: str = "") -> None:
        self.app, self.hosts, self.prefix = app, hosts, prefix

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = scope["path"]
        if path.startswith(f"{self.prefix}/") and not ALLOWED_PATHS.fullmatch(path):
            scope = {**scope, "path": path.removeprefix(self.prefix)}
        status, text = self._check(scope)
        if status != 200:
            headers = [(b"content-type", b"text/plain"), *([(b"location", text.encode())] if status == 308 else [])]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": text.encode()})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                others = [pair for pair in message["headers"] if not REPLACED.match(pair[0].lower().decode())]
                message = {**message, "headers": [*others, *ours]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _check(self, scope: Message) -> tuple[int, str]:
        """The status for a request: 200, or another and the reason for which it is refused."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = re.sub(r":\d+$", "", headers.get("host", "")).strip("[]").lower()
        if self.hosts is not None and host not in self.hosts:
            port = scope["server"][1]
            return 421, (
                "the demo answers only as localhost. From another machine, open an ssh tunnel "
                f"(ssh -L {port}:localhost:{port} MACHINE) and visit http://localhost:{port}. Behind a reverse proxy, start the "
                "demo with --root-path and its public address. --host 0.0.0.0 opens it to everyone who reaches this machine."
            )
        if scope["path"] == self.prefix:  # the page's own addresses are relative
            return 308, f"{self.prefix}/"
        if not ALLOWED_PATHS.fullmatch(scope["path"]):
            return 404, "not found"
        if "transfer-encoding" in headers:
            return 411, "the request has no content-length"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return 413, f"the request has more than {MAX_BODY} bytes"
        return 200, ""


def is_local(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build_app(setup: Setup, host: str, root_path: str = "") -> Any:
    """Return the demo's server as an ASGI application. `root_path` is its public address behind a reverse proxy."""
    from fastapi import FastAPI

    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def mount() -> Any:
        return gr.mount_gradio_app(
            outer,
            build_page(setup),
            path="/",
            server_name=host,
            root_path=root_path.rstrip("/"),
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=MAX_BYTES,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=gr.themes.Default(
                primary_hue="sky", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),  # system fonts: nothing is downloaded
            css=files("st_ar").joinpath("templates/demo.css").read_text(encoding="utf-8"),
        )

    with ThreadPoolExecutor(1) as thread:  # without a running event loop Gradio creates some that are never closed
        mounted = thread.submit(lambda: asyncio.run(mount())).result()
    public = urlsplit(root_path)
    hosts = frozenset({"localhost", "127.0.0.1", "::1", public.hostname or "localhost"})
    return Guard(StreamCloseBarrier(mounted), hosts if is_local(host) else None, public.path.rstrip("/"))


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address of this machine; port 0 takes a free one. UserError if it is taken."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port must lie between 0 (any free port) and 65535, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise UserError(
            f"cannot serve on {host}, port {port}: {error.strerror or error}; give another --port (0 takes a free one) or --host"
        ) from error
    return sock


def make_server(setup: Setup, host: str, root_path: str = "") -> Any:
    """Return a uvicorn server of the demo. Its `run` takes the socket."""
    app = build_app(setup, host, root_path)
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False, ws="none")
    )


def serve(setup: Setup, host: str, port: int, root_path: str = "") -> None:
    """Serve the demo until SIGTERM (Interrupted) or SIGINT (KeyboardInterrupt)."""
    sock = bind(host, port)
    # uvicorn calls these after it has shut down. Background jobs of a shell would otherwise ignore SIGINT.
    handlers = {signal.SIGTERM: _interrupt, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        server = make_server(setup, host, root_path)
        sock.listen()  # early visitors wait until the server is ready
        address = f"http://{'localhost' if is_local(host) else host}:{sock.getsockname()[1]}"
        public = f", behind a proxy at {root_path.rstrip('/')}/" if root_path else ""
        print(f"the demo is at {address}{public} (press Ctrl-C to stop it)", flush=True)
        server.run(sockets=[sock])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        setup.pool.close()


def _interrupt(signum: int, _frame: object) -> None:
    raise Interrupted("the demo was stopped", signum)
