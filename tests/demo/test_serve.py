"""The page's server: what answers, to whom, and the command that starts it."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from st_ar import quickstart
from st_ar.cli import run_command
from st_ar.data.store import TokenStore
from st_ar.demo import serve
from st_ar.demo.inputs import MAX_BYTES
from st_ar.demo.models import ModelPool
from st_ar.demo.reading import NO_CLASS, OWN_CLASS
from st_ar.demo.serve import (
    HEADERS,
    JOIN_PATH,
    MAX_BODY,
    STREAM_PATH,
    Guard,
    Message,
    StreamCloseBarrier,
    bind,
    build_app,
    describe,
    is_local,
)
from st_ar.demo.setup import Setup, find_runs, quickstart_setup
from st_ar.demo.tabs import update_classes
from st_ar.demo.understand_tab import update_choices
from st_ar.errors import Interrupted, UserError
from tests.data.random_store import random_store
from tests.demo.small_page import export, small_setup
from tests.disk import refused
from tests.small_line import SmallLine, make_line
from tests.toys import TINY, TINY_TEXT, random_model


@pytest.fixture
def line(tmp_path: Path) -> SmallLine:
    return make_line(tmp_path)


def ask(
    app: Any, path: str, *, host: str = "localhost:7860", method: str = "GET", body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """What an ASGI application answers."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in ({"host": host} | headers).items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "scheme": "http", "headers": pairs, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 7860),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with small_setup(tmp_path_factory.mktemp("served")) as (setup, _):
        yield build_app(setup, "127.0.0.1")


def test_the_page_is_served_with_headers_that_keep_it_here(app: Guard) -> None:
    status, headers, body = ask(app, "/")
    assert status == 200
    assert b"gradio" in body
    assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "default-src 'self'" in headers["content-security-policy"]
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    config = json.loads(ask(app, "/config")[2])
    assert config["analytics_enabled"] is False
    assert not re.search(
        r"fonts\.googleapis|https?://(?!localhost|www\.w3\.org|api\.gradio|huggingface)", config["css"] or ""
    )


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/monitoring",
            "/docs",
            "/openapi.json",
            "/login",
            "/gradio_api/vibe-edit",
            "/gradio_api/proxy=http://example.org",
        ),
        *(
            "/gradio_api/runs",
            "/gradio_api/process_recording",
            "/gradio_api/run/start",
            "/gradio_api/call/start",
            "/gradio_api/dev/reload",
        ),
        *("/gradio_api/component_server", "/gradio_api/custom_component/1/2/3/4", "/gradio_api/profiling/traces"),
    ],
)
def test_what_the_page_does_not_need_does_not_answer(app: Guard, path: str) -> None:
    assert ask(app, path)[::2] == (404, b"not found")


def test_files_of_the_machine_are_not_served(app: Guard) -> None:
    for file in ("/etc/passwd", str(Path(__file__).resolve()), "/gradio_api/file=/etc/passwd", "http://example.org"):
        assert ask(app, f"/gradio_api/file={file}")[0] in (403, 404)
    assert ask(app, "/static/../../../../etc/passwd")[0] in (403, 404)


def test_other_hosts_names_and_large_requests_are_refused(app: Guard) -> None:
    for host in ("evil.example", "evil.example:7860", "localhost.evil.example", ""):
        assert ask(app, "/", host=host)[0] == 421
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:7860", "[::1]:7860"):
        assert ask(app, "/", host=host)[0] == 200
    said = ask(app, "/", host="machine.example:7860")[2].decode()
    assert "(ssh -L 7860:localhost:7860 MACHINE)" in said
    assert "--root-path and its public address" in said
    assert "--host 0.0.0.0 opens it to everyone" in said
    assert ask(app, "/gradio_api/upload", method="POST", content_length=str(MAX_BODY + 1))[0] == 413
    assert ask(app, "/gradio_api/upload", method="POST", content_length="x")[0] == 413
    assert ask(app, "/gradio_api/upload", method="POST", transfer_encoding="chunked")[0] == 411


def test_behind_a_proxy_its_name_and_prefix_are_answered(tmp_path: Path) -> None:
    with small_setup(tmp_path) as (setup, _):
        app = build_app(setup, "127.0.0.1", "https://proxy.example/a/demo/")
    for host, status in (
        ("proxy.example", 200),
        ("Proxy.Example:443", 200),
        ("localhost:7860", 200),
        ("a.example", 421),
    ):
        assert ask(app, "/config", host=host)[0] == status
        assert ask(app, "/a/demo/config", host=host)[0] == status
    assert json.loads(ask(app, "/config", host="proxy.example")[2])["root"] == "https://proxy.example/a/demo"
    for path in ("/a/demo/monitoring", "/a/config", "/a/demo/a/demo/config", "/a/demonstration"):
        assert ask(app, path)[0] == 404
    status, headers, _ = ask(app, "/a/demo", host="proxy.example")
    assert (status, headers["location"]) == (308, "/a/demo/")


def test_no_website_may_read_what_the_demo_answers_to_a_visitor(tmp_path: Path) -> None:
    with small_setup(tmp_path) as (setup, _):
        app = build_app(setup, "0.0.0.0")
    for origin in ("https://evil.example", "null"):
        status, headers, _ = ask(app, "/config", host="machine.example", origin=origin)
        assert status == 200
        assert not [name for name in headers if name.startswith("access-control-")]


@pytest.mark.parametrize(("size", "status"), [(MAX_BYTES, 200), (MAX_BYTES + 1, 413)])
def test_larger_uploads_are_refused_by_gradio(app: Guard, size: int, status: int) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + b"a" * size + b"\r\n--x--\r\n"
    given = {"content_type": "multipart/form-data; boundary=x", "content_length": str(len(body))}
    assert ask(app, "/gradio_api/upload", method="POST", body=body, **given)[0] == status


def test_local_addresses_are_known() -> None:
    assert [is_local(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_local(host) for host in ("0.0.0.0", "::", "192.168.0.7", "example.org")] == [False] * 4


def test_a_port_that_is_taken_or_none_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=r"cannot serve on 127.0.0.1, port \d+: .*give another --port"):
            bind("127.0.0.1", other.getsockname()[1])
    with pytest.raises(UserError, match=r"--port must lie between 0 .* and 65535, not 65536"):
        bind("127.0.0.1", 65536)
    with pytest.raises(UserError, match=r"cannot serve on 203\.0.113.7"):
        bind("203.0.113.7", 0)


def test_the_command_serves_until_it_is_interrupted(line: SmallLine, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    command = ["demo", "--model", line.model, "--tokenizer", line.tokenizer, "--tokens", line.tokens]
    command += ["--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-m", "st_ar", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
    ) as process:
        try:
            assert process.stdout is not None
            line_read = process.stdout.readline()
            found = re.fullmatch(r"the demo is at (http://localhost:\d+) \(press Ctrl-C to stop it\)\n", line_read)
            assert found, line_read
            assert len([*(tmp_path / "temporary").glob("st-ar-demo-*")]) == 1
            with urllib.request.urlopen(found[1], timeout=60) as answer:
                assert b"model (EMA)" in answer.read()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", "st-ar: interrupted\n")
    assert list((tmp_path / "temporary").glob("st-ar-demo-*")) == []


def test_sigterm_ends_the_server_and_its_handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    real = serve.make_server

    def make_server(*given: Any) -> Any:
        server = real(*given)
        startup = server.startup

        async def start_and_terminate(sockets: list[socket.socket]) -> None:
            await startup(sockets)
            os.kill(os.getpid(), signal.SIGTERM)

        server.startup = start_and_terminate
        return server

    monkeypatch.setattr(serve, "make_server", make_server)
    with small_setup(tmp_path) as (setup, _), pytest.raises(Interrupted, match="the demo was stopped") as stop:
        serve.serve(setup, "127.0.0.1", 0)
    assert stop.value.signum == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--model", "model"), "--model needs a tokenizer"),
        (("--model", "a", "b", "c", "--tokenizer", "tokenizer"), "has 3 models: the demo compares at most two"),
        (("--tokenizer", "tokenizer"), "--tokenizer needs --model"),
        (("--probe-tokens", "tokens"), "--probe-tokens needs --model"),
        (
            ("--model", "model", "--tokenizer", "tokenizer", "--quickstart", "other"),
            "--quickstart and --model exclude each other",
        ),
        (("--model", "model", "--tokenizer", "tokenizer", "--probe-images", "1"), "--probe-images must be at least 2"),
        (("--model", "model", "--tokenizer", "tokenizer", "--runs", "tokens"), "is not a run"),
        (("--model", "nothing", "--tokenizer", "tokenizer"), "nothing does not exist"),
        (("--model", "model", "--tokenizer", "tokenizer", "--host", ""), "--host is empty: give an address"),
        *(
            (
                ("--model", "model", "--tokenizer", "tokenizer", "--root-path", address),
                f"--root-path {address} is not a full address: give the public one, such as https://",
            )
            for address in ("/demo", "example.org/demo")
        ),
        (("--model", "model", "model", "--tokenizer", "tokenizer"), "two models are called"),
        (("--model", "model", "--tokenizer", "tokenizer", "--names", "a", "b"), "2 --names for 1 models"),
    ],
)
def test_mistakes_cost_nothing(line: SmallLine, tmp_path: Path, options: tuple[str, ...], match: str) -> None:
    known = {"model": line.model, "tokenizer": line.tokenizer, "tokens": line.tokens, "nothing": tmp_path / "nothing"}
    with refused(tmp_path, match):
        run_command(["demo", "--port", "0", *(str(known.get(option, option)) for option in options)])


def test_models_that_do_not_suit_are_refused(line: SmallLine, tmp_path: Path) -> None:
    from tests.small_line import random_tokenizer
    from tests.toys import save_export

    random_tokenizer(11, seed=1).save(tmp_path / "other")
    with pytest.raises(UserError, match="give the tokenizer that made the model's token store"):
        ModelPool([line.model], tmp_path / "other", device="cpu")
    text = random_model(TINY_TEXT)
    save_export(tmp_path / "text", text, text, {"step": 0, "preset": "toy"})
    with pytest.raises(UserError, match="text models are not supported there"):
        ModelPool([tmp_path / "text"], line.tokenizer, device="cpu")
    random_tokenizer(12).save(tmp_path / "larger")
    info = random_model(TINY)
    save_export(tmp_path / "silent", info, info, {"step": 0, "preset": "toy"})
    with pytest.raises(UserError, match=r"has 11 codes, .* has 12"):
        ModelPool([tmp_path / "silent"], tmp_path / "larger", device="cpu")


def test_weights_that_became_another_model_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    from dataclasses import replace

    with small_setup(tmp_path) as (setup, _):
        export(tmp_path / "first", replace(TINY, n_layers=2), 10)
        with pytest.raises(UserError, match="has changed since the demo started"):
            setup.pool.run(lambda: setup.pool.open("first (EMA)"))


def test_runs_are_found_among_the_models_and_named(line: SmallLine, tmp_path: Path) -> None:
    from st_ar.files import write_json
    from st_ar.presets import get_preset
    from st_ar.settings import to_dict

    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for run in runs:
        write_json(run / "config.json", {"config": to_dict(get_preset("st-ar-photos"))})
        (run / "log.jsonl").touch()
    assert find_runs([line.model, runs[0]], []) == {"run": runs[0]}
    assert find_runs([runs[0]], [runs[0], runs[1]]) == {str(run): run for run in runs}
    assert find_runs([line.model], []) == {}


def test_a_missing_quickstart_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(out: Path) -> Path:
        made.append(out)
        raise UserError("stopped here")

    monkeypatch.setattr(quickstart, "quickstart", make)
    with pytest.raises(UserError, match="stopped here"):
        quickstart_setup(tmp_path, device="cpu", dtype="float32", probe_images=50)
    assert made == [tmp_path]


CLOSE = b'data: {"event_id":null,"msg":"close_stream"}\n\n'
DONE = b'data: {"event_id":"a","msg":"process_completed","output":{"data":["\\"msg\\":\\"close_stream\\""]}}\n\n'


async def gradio(scope: Message, receive: Any, send: Any) -> None:
    """Queues every job, and closes every stream after one message."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"].startswith(STREAM_PATH):
        for body in (DONE, CLOSE):
            await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Asked:
    """A request of a browser's, and what has come back so far."""

    def __init__(self, app: StreamCloseBarrier, path: str, visitor: str) -> None:
        body = json.dumps({"data": [], "session_hash": visitor}).encode() if path == JOIN_PATH else b""
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
        app = StreamCloseBarrier(gradio)
        stream = Asked(app, STREAM_PATH, "me")
        await settle()
        assert stream.bodies == [DONE, CLOSE]  # the answer's end waits
        mine, other = Asked(app, JOIN_PATH, "me"), Asked(app, JOIN_PATH, "you")
        await settle()
        assert (mine.got, other.bodies) == ([], [b""])
        stream.drop()
        await settle()
        assert (mine.bodies, stream.bodies) == ([b""], [DONE, CLOSE, b""])
        assert app.closing == {}
        later = Asked(app, JOIN_PATH, "me")
        await settle()
        assert later.bodies == [b""]
        await asyncio.gather(*(asked.served for asked in (stream, mine, other, later)))

    asyncio.run(tell())


def test_a_browser_that_keeps_a_closed_stream_is_waited_for_a_while() -> None:
    async def tell() -> None:
        app = StreamCloseBarrier(gradio, timeout=0.05)
        stream, job = Asked(app, STREAM_PATH, "me"), Asked(app, JOIN_PATH, "me")
        await settle()
        assert job.got == []
        await asyncio.gather(stream.served, job.served)
        assert (job.bodies, stream.bodies) == ([b""], [DONE, CLOSE, b""])

    asyncio.run(tell())


def test_requests_that_do_not_say_whose_they_are_are_passed_on() -> None:
    async def tell() -> None:
        app = StreamCloseBarrier(gradio)
        stream = Asked(app, STREAM_PATH, "me")
        await settle()
        for body in (b"", b"{", b"[]", b"\xff", b"{}"):
            job = Asked(app, JOIN_PATH, "")
            job.to_come.get_nowait()
            job.to_come.put_nowait({"type": "http.request", "body": body, "more_body": False})
            await job.served
            assert job.bodies == [b""]
        stream.drop()
        await stream.served

    asyncio.run(tell())


def test_weights_of_one_shape_are_named_together(tmp_path: Path) -> None:
    models = [export(tmp_path / name, replace(TINY, n_layers=layers), 1) for name, layers in (("a", 4), ("<b>", 2))]
    pool = ModelPool(models, make_line(tmp_path).tokenizer, device="cpu", dtype="float32")
    pool.close()
    size = f"layers of width {TINY.dim}, 3 x 3 tokens"
    assert describe(pool) == f"a, a (EMA): 4 {size}; <b>, <b> (EMA): 2 {size}; cpu, float32"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Generator[Setup]:
    """Two models, of which b has fewer layers, heads and classes than a."""
    folder = tmp_path_factory.mktemp("page")
    models = [
        export(folder / "a", TINY, 1),
        export(folder / "b", replace(TINY, n_layers=2, n_heads=1, num_classes=2), 1, ["ant", "bee"]),
    ]
    pool = ModelPool(models, make_line(folder).tokenizer, device="cpu", dtype="float32")
    yield Setup(pool=pool, store=None, probe_store=None)
    pool.close()


def test_a_store_that_names_other_classes_is_refused(setup: Setup, tmp_path: Path) -> None:
    names = ["bee", "ant"]
    pool = ModelPool(
        [export(tmp_path / "m", replace(TINY, num_classes=2), 1, ["ant", "bee"])],
        make_line(tmp_path).tokenizer,
        device="cpu",
    )
    store = random_store(tmp_path / "store", images=2, grid=TINY.grid, vocab_size=TINY.vocab_size, num_classes=2)[0]
    meta = json.loads((store / "meta.json").read_text())
    meta |= {"class_names": names, "tokenizer": setup.pool.tokenizer.fingerprint}
    (store / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"and m have different class names \(class 0 is 'ant' and 'bee'\)"):
        Setup(pool=pool, store=TokenStore(store), probe_store=None)
    pool.close()


def test_classes_stay_chosen_as_far_as_other_weights_know_them(setup: Setup) -> None:
    kept = update_classes(setup, "b", [0, 2, 1])
    assert kept["choices"] == [("ant", 0), ("bee", 1)]
    assert kept["value"] == [0, 1]
    assert update_classes(setup, "a", [0, 2, 1])["value"] == [0, 2, 1]
    assert update_classes(setup, "a", None)["value"] == []


def test_class_layer_and_head_stay_as_far_as_other_weights_have_them(setup: Setup) -> None:
    given, layer, head = update_choices(setup, "b", 2, 4, 2)
    assert (given["value"], layer["value"], head["value"]) == (OWN_CLASS, 2, 0)
    assert layer["maximum"] == 2
    assert head["choices"] == [("average", 0), ("1", 1)]
    assert given["choices"] == [("the image's class", OWN_CLASS), ("none", NO_CLASS), ("ant", 0), ("bee", 1)]
    given, layer, head = update_choices(setup, "a", 2, 4, 2)
    assert (given["value"], layer["value"], head["value"]) == (2, 4, 2)
