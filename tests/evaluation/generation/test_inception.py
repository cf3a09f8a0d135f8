"""Inception's graph against formulas written out, and its weights' file against those that are not it. No real weights here."""

import http.server
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from st_ar.errors import UserError
from st_ar.evaluation.generation import inception as inception_weights
from st_ar.evaluation.generation.inception import (
    FILES,
    BlockA,
    BlockC,
    BlockE,
    Inception,
    average_pool,
    find_weights,
    load_inception,
    resize_bilinear,
)
from st_ar.files import cache_folder
from tests.disk import contents, refused

# The resize


def written_out(image: np.ndarray, side: int) -> np.ndarray:
    """TF1's ResizeBilinear of one channel [H, W], place by place."""
    height, width = image.shape
    result = np.empty((side, side))
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            result[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return result


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 31), st.integers(0, 100))
def test_the_resize_is_the_formula_written_out(height: int, width: int, side: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (1, 2, height, width)).astype(np.float32)
    found = resize_bilinear(torch.from_numpy(images), side)[0].numpy()
    for channel in (0, 1):
        np.testing.assert_allclose(found[channel], written_out(images[0, channel], side), rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize(("height", "width"), [(31, 33), (299, 299), (256, 400), (700, 301)])
def test_the_resize_to_299_of_real_sizes(height: int, width: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 1, height, width)).astype(np.float32)
    found = resize_bilinear(torch.from_numpy(images))[0, 0].numpy()
    # Where a place falls on a pixel of the input but for rounding, either side of it gives nearly the same value.
    np.testing.assert_allclose(found, written_out(images[0, 0], 299), atol=0.05)
    if height == width == 299:
        np.testing.assert_array_equal(found, images[0, 0])


def test_the_resize_has_no_half_pixel_centres_and_does_not_align_corners() -> None:
    ramp = torch.tensor([0.0, 10.0]).view(1, 1, 1, 2)
    assert resize_bilinear(ramp, 4)[0, 0, 0].tolist() == [0, 5, 10, 10]


# The graph


def conv_shapes() -> dict[str, tuple[int, ...]]:
    """Every convolution's weight, from the paper's tables and the public files' names."""
    shapes: dict[str, tuple[int, ...]] = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }
    for name, width, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        shapes |= {
            f"Mixed_{name}.branch1x1": (64, width, 1, 1),
            f"Mixed_{name}.branch5x5_1": (48, width, 1, 1),
            f"Mixed_{name}.branch5x5_2": (64, 48, 5, 5),
            f"Mixed_{name}.branch3x3dbl_1": (64, width, 1, 1),
            f"Mixed_{name}.branch3x3dbl_2": (96, 64, 3, 3),
            f"Mixed_{name}.branch3x3dbl_3": (96, 96, 3, 3),
            f"Mixed_{name}.branch_pool": (pool, width, 1, 1),
        }
    shapes |= {
        "Mixed_6a.branch3x3": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_1": (64, 288, 1, 1),
        "Mixed_6a.branch3x3dbl_2": (96, 64, 3, 3),
        "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3),
    }
    for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        shapes |= {
            f"Mixed_{name}.branch1x1": (192, 768, 1, 1),
            f"Mixed_{name}.branch7x7_1": (c, 768, 1, 1),
            f"Mixed_{name}.branch7x7_2": (c, c, 1, 7),
            f"Mixed_{name}.branch7x7_3": (192, c, 7, 1),
            f"Mixed_{name}.branch7x7dbl_1": (c, 768, 1, 1),
            f"Mixed_{name}.branch7x7dbl_2": (c, c, 7, 1),
            f"Mixed_{name}.branch7x7dbl_3": (c, c, 1, 7),
            f"Mixed_{name}.branch7x7dbl_4": (c, c, 7, 1),
            f"Mixed_{name}.branch7x7dbl_5": (192, c, 1, 7),
            f"Mixed_{name}.branch_pool": (192, 768, 1, 1),
        }
    shapes |= {
        "Mixed_7a.branch3x3_1": (192, 768, 1, 1),
        "Mixed_7a.branch3x3_2": (320, 192, 3, 3),
        "Mixed_7a.branch7x7x3_1": (192, 768, 1, 1),
        "Mixed_7a.branch7x7x3_2": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_3": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3),
    }
    for name, width in (("7b", 1280), ("7c", 2048)):
        shapes |= {
            f"Mixed_{name}.branch1x1": (320, width, 1, 1),
            f"Mixed_{name}.branch3x3_1": (384, width, 1, 1),
            f"Mixed_{name}.branch3x3_2a": (384, 384, 1, 3),
            f"Mixed_{name}.branch3x3_2b": (384, 384, 3, 1),
            f"Mixed_{name}.branch3x3dbl_1": (448, width, 1, 1),
            f"Mixed_{name}.branch3x3dbl_2": (384, 448, 3, 3),
            f"Mixed_{name}.branch3x3dbl_3a": (384, 384, 1, 3),
            f"Mixed_{name}.branch3x3dbl_3b": (384, 384, 3, 1),
            f"Mixed_{name}.branch_pool": (192, width, 1, 1),
        }
    return shapes


def test_names_and_shapes_of_weights_are_those_of_the_public_files() -> None:
    expected: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in conv_shapes().items():
        expected[f"{name}.conv.weight"] = shape
        expected |= {f"{name}.bn.{what}": shape[:1] for what in ("weight", "bias", "running_mean", "running_var")}
    with torch.device("meta"):
        found = Inception().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    assert len(conv_shapes()) == 94


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Weights and statistics that keep activations' size and that no two channels share."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif name.endswith("bn.weight"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) / 2 + 0.75)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


@pytest.fixture(scope="module")
def network() -> Inception:
    network = Inception()
    randomise(network)
    return network


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (3, 40, 52, 3), dtype=torch.uint8, generator=generator)


def naive(
    weights: dict[str, Tensor], name: str, x: Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Convolution, batch norm (eps 0.001) and ReLU by their formulas, from a state dict."""
    x = F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=padding)
    bn = {key: weights[f"{name}.bn.{key}"].view(-1, 1, 1) for key in ("weight", "bias", "running_mean", "running_var")}
    x = (x - bn["running_mean"]) / (bn["running_var"] + 0.001) ** 0.5 * bn["weight"] + bn["bias"]
    return x.clamp(min=0)


def naive_average(x: Tensor) -> Tensor:
    """Sums over 3 x 3 places inside the map over how many they are."""
    ones = torch.ones(x.shape[1], 1, 3, 3)
    total, number = (F.conv2d(y, ones, padding=1, groups=x.shape[1]) for y in (x, torch.ones_like(x)))
    return total / number


def test_average_pools_leave_out_the_padding() -> None:
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(average_pool(x), naive_average(x))
    assert average_pool(torch.ones(1, 1, 3, 3)).min() == 1


def test_a_block_of_35_is_its_branches_in_order() -> None:
    block = BlockA(12, 7)
    randomise(block)
    w, x = block.state_dict(), torch.randn(2, 12, 6, 5)
    five = naive(w, "branch5x5_2", naive(w, "branch5x5_1", x), padding=(2, 2))
    double = naive(w, "branch3x3dbl_2", naive(w, "branch3x3dbl_1", x), padding=(1, 1))
    double = naive(w, "branch3x3dbl_3", double, padding=(1, 1))
    parts = [naive(w, "branch1x1", x), five, double, naive(w, "branch_pool", naive_average(x))]
    torch.testing.assert_close(block(x), torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


def test_a_block_of_17_is_its_branches_in_order() -> None:
    block = BlockC(8)
    randomise(block)
    w, x = block.state_dict(), torch.randn(2, 768, 9, 8)
    row, column = (0, 3), (3, 0)
    single = naive(w, "branch7x7_2", naive(w, "branch7x7_1", x), padding=row)
    single = naive(w, "branch7x7_3", single, padding=column)
    double = naive(w, "branch7x7dbl_1", x)
    for number, padding in ((2, column), (3, row), (4, column), (5, row)):
        double = naive(w, f"branch7x7dbl_{number}", double, padding=padding)
    parts = [naive(w, "branch1x1", x), single, double, naive(w, "branch_pool", naive_average(x))]
    torch.testing.assert_close(block(x), torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_pool", [False, True])
def test_a_block_of_8_is_its_branches_in_order(max_pool: bool) -> None:
    block = BlockE(10, max_pool=max_pool)
    randomise(block)
    w, x = block.state_dict(), torch.randn(2, 10, 5, 6) - 3  # mostly negative: a max pool padded with zeros would show
    single = naive(w, "branch3x3_1", x)
    double = naive(w, "branch3x3dbl_2", naive(w, "branch3x3dbl_1", x), padding=(1, 1))
    parts = [naive(w, "branch1x1", x)]
    for name, y in (("branch3x3_2", single), ("branch3x3dbl_3", double)):
        parts += [naive(w, f"{name}a", y, padding=(0, 1)), naive(w, f"{name}b", y, padding=(1, 0))]
    framed = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    largest = framed.unfold(2, 3, 1).unfold(3, 3, 1).amax(dim=(-2, -1))
    parts.append(naive(w, "branch_pool", largest if max_pool else naive_average(x)))
    torch.testing.assert_close(block(x), torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


def test_only_the_last_block_has_the_max_pool(network: Inception) -> None:
    assert (network.Mixed_7b.max_pool, network.Mixed_7c.max_pool) == (False, True)


def test_features_are_pool_3_the_spatial_map_nhwc_and_logits_without_bias(network: Inception, images: Tensor) -> None:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output

        hooks.append(network.get_submodule(name).register_forward_hook(hook))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for name in ("Mixed_5b", "Mixed_6a", "Mixed_6d.branch1x1", "Mixed_7c"):
        keep(name)
    handle = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.update(input=inputs[0]))
    pooled, spatial, logits = network(images)
    for hook in [*hooks, handle]:
        hook.remove()
    assert [list(t.shape) for t in (pooled, spatial, logits)] == [[3, 2048], [3, 2023], [3, 1008]]
    assert [list(seen[n].shape[2:]) for n in ("Mixed_5b", "Mixed_6a", "Mixed_7c")] == [[35, 35], [17, 17], [8, 8]]
    resized = resize_bilinear(images.permute(0, 3, 1, 2).float())
    torch.testing.assert_close(seen["input"], resized / 128 - 1, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pooled, seen["Mixed_7c"].mean((2, 3)))
    branch = seen["Mixed_6d.branch1x1"]
    assert branch.min() == 0  # after ReLU
    for place, (row, column, channel) in ((0, (0, 0, 0)), (6, (0, 0, 6)), (7, (0, 1, 0)), (17 * 7 + 2, (1, 0, 2))):
        assert torch.equal(spatial[:, place], branch[:, channel, row, column])
    expected = torch.stack([(pooled * row).sum(1) for row in network.fc.weight], 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert network.fc.bias.abs().max() > 0.1  # so that adding it would show


def test_an_images_features_do_not_depend_on_the_batch_or_the_mode(network: Inception, images: Tensor) -> None:
    whole = network(images)
    network.train()
    for index in range(3):
        alone = network(images[index : index + 1])
        for a, b in zip(alone, whole, strict=True):
            torch.testing.assert_close(a[0], b[index], rtol=1e-4, atol=1e-5)


# The weights' file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ST_AR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Server:
    """Answers every request in one way."""

    def __init__(self, status: int, body: bytes, length: int) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/{FILES[0]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def serve() -> Iterator[object]:
    servers: list[Server] = []

    def start(status: int, body: bytes, length: int | None = None) -> str:
        servers.append(Server(status, body, len(body) if length is None else length))
        return servers[-1].url

    yield start
    for server in servers:
        server.close()


def expect(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(inception_weights, "SHA256", sha256(content).hexdigest())


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ST_AR_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("ST_AR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/st-ar")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/st-ar")


def test_a_right_download_is_kept_and_not_fetched_again(cache: Path, serve, monkeypatch, capsys) -> None:
    body = bytes(range(256)) * 10_000
    expect(monkeypatch, body)
    found = find_weights(url=serve(200, body))
    assert contents(cache) == {FILES[0]: body}
    assert "downloaded, its SHA-256 is right" in capsys.readouterr().err
    assert find_weights(url="http://127.0.0.1:9/nothing") == found == cache / FILES[0]


@pytest.mark.parametrize(
    ("body", "length"), [(b"right"[:-2], 5), (b"right"[:-2], 3), (b"wrong", 5)], ids=["cut short", "shorter", "other"]
)
def test_a_download_that_is_cut_short_or_wrong_leaves_nothing(
    cache: Path, serve, monkeypatch, body: bytes, length: int
) -> None:
    expect(monkeypatch, b"right")
    with pytest.raises(UserError, match=rf"damaged or cut short \({len(body)} of {length} bytes.*put it at {cache}"):
        find_weights(url=serve(200, body, length))
    assert contents(cache) == {}


def test_a_server_that_refuses_is_told_with_where_to_put_the_file(cache: Path, serve) -> None:
    with pytest.raises(UserError, match=rf"cannot be downloaded \(Not Found\): get {FILES[0]} .* put it at {cache}"):
        find_weights(url=serve(404, b""))
    assert contents(cache) == {}


def test_without_a_network_the_error_says_where_to_put_the_file(cache: Path) -> None:
    with pytest.raises(UserError, match=rf"cannot be downloaded \(.*refused.*put it at {cache / FILES[0]}, or name it"):
        find_weights(url="http://127.0.0.1:9/nothing")


@pytest.mark.parametrize("name", FILES)
def test_either_name_is_found_in_the_cache_and_in_a_folder_that_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expect(monkeypatch, b"weights")
    for folder in (cache, tmp_path / "own"):
        folder.mkdir()
        (folder / name).write_bytes(b"weights")
    assert find_weights() == cache / name
    assert find_weights(tmp_path / "own") == find_weights(tmp_path / "own" / name) == tmp_path / "own" / name


def test_a_path_without_the_file_is_refused(tmp_path: Path) -> None:
    with refused(tmp_path, "--inception .*nothing.pth does not exist: give the file pt_inception"):
        find_weights(tmp_path / "nothing.pth")
    with refused(tmp_path, "holds neither pt_inception.* nor weights-inception.*: put one of them there"):
        find_weights(tmp_path)


def test_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILES[0]).write_bytes(b"something else")
    begins = sha256(b"something else").hexdigest()[:8]
    with refused(tmp_path, f"is not Inception's file of weights: its SHA-256 begins with {begins}, not 6726825d"):
        find_weights(tmp_path)


def test_the_file_is_loaded_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Inception) -> None:
    path = tmp_path / FILES[1]
    weights = network.state_dict()
    extra = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}  # the public files carry these counters
    torch.save(weights | extra, path)
    expect(monkeypatch, path.read_bytes())
    loaded = load_inception(path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.save({name: weights[name] for name in weights if name != "fc.bias"}, path)
    expect(monkeypatch, path.read_bytes())
    with pytest.raises(UserError, match=r"does not hold the weights of the 2015-12-05 Inception-v3.*fc\.bias"):
        load_inception(path)
    torch.save(weights | {"AuxLogits.fc.weight": torch.zeros(1)}, path)
    expect(monkeypatch, path.read_bytes())
    with pytest.raises(UserError, match=r"does not hold.*AuxLogits"):
        load_inception(path)
