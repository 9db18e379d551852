"""Netron for real, in a headless Chromium that nothing reaches but this machine; and one block of a graph."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest

import optimize
from optimize.errors import InputError, MissingError
from optimize.kernels import functions
from optimize.tools import cli, inspecting, netron

pytest.importorskip("netron", reason="needs netron")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
# Netron puts a refusing eval in place of the window's, which Playwright needs: the window keeps its own
KEEP_EVAL = "const kept = window.eval; Object.defineProperty(window, 'eval', {get: () => kept, set: () => {}});"


@contextmanager
def served(path: Path) -> Iterator[str]:
    with netron.server_for(path) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def view(demo_bundle: Path) -> Path:
    return inspecting.view_at(demo_bundle, "unet", None)


# --- in the browser --------------------------------------------------------------------------------------------------


@needs_chromium
def test_the_unet_is_drawn(view: Path, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    graph = onnx.load(view).graph
    left: list[str] = []

    def stop(route: sync_api.Route) -> None:
        left.append(route.request.url)
        route.abort()

    with served(view) as url, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1600, "height": 1200})
        page.add_init_script(KEEP_EVAL)
        page.route(lambda asked: not asked.startswith(url), stop)
        page.goto(url)
        page.wait_for_selector('g.node[transform]:not([style*="opacity: 0"])', state="attached", timeout=30_000)
        boxes = page.locator("g.node").evaluate_all(
            "found => found.map(g => [g.id, g.querySelector('text').textContent, g.getAttribute('transform')])"
        )
        edges = page.locator("path.edge-path").count()
        page.screenshot(path=tmp_path / "unet.png")
        browser.close()
    nodes = [(n.name, n.op_type) for n in graph.node]
    drawn = [(box.removeprefix("node-name-"), text) for box, text, _ in boxes if box.startswith("node-name-")]
    assert sorted(drawn) == sorted(nodes)
    assert sum(text in ("Attention", "Conv") for _, text in drawn) == 8 + 33
    assert len(boxes) == len(nodes) + len(graph.input) + len(graph.output)
    assert len({place for _, _, place in boxes}) == len(boxes)  # each has a place of its own
    assert edges >= len(nodes)
    assert left == []  # what Netron reports never leaves the page
    assert (tmp_path / "unet.png").stat().st_size > 10_000


@needs_chromium
def test_a_node_of_ours_opens_its_body(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    optimize.export("arch:llama@tiny", tmp_path / "d", kernels=True)
    (path,) = (tmp_path / "d").glob("*/*.view.onnx")
    with served(path) as url, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1600, "height": 1200})
        page.add_init_script(KEEP_EVAL)
        page.route(lambda asked: not asked.startswith(url), lambda route: route.abort())
        page.goto(url)
        ours = page.locator('g.node:has(g.node-item-type text:text-is("RotaryQK"))').first
        ours.wait_for(state="attached", timeout=30_000)
        body = page.locator('g.node-item-type text:text-is("RotaryEmbedding")')
        for _ in range(6):  # on a busy machine a node is there before it listens to clicks
            ours.locator('g.node-item-type:has(text:text-is("ƒ"))').dispatch_event("click")
            with contextlib.suppress(sync_api.TimeoutError):
                body.first.wait_for(state="attached", timeout=10_000)
                break
        texts = page.locator("g.node-item-type text").all_text_contents()
        page.screenshot(path=tmp_path / "body.png")
        browser.close()
    standard = [node.op_type for node in functions.function("RotaryQK").node]
    assert sorted(texts) == sorted(standard)  # and no node of the graph that it was opened from


# --- the server ------------------------------------------------------------------------------------------------------


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, b""


def test_the_page_opens_the_view_and_talks_to_nobody_else(view: Path) -> None:
    with served(view) as url:
        with urllib.request.urlopen(url, timeout=10) as answer:
            page, headers = answer.read().decode(), answer.headers
        assert f'<meta name="file" content="/data/{view.name}">' in page
        assert 'name="date"' not in page  # a page that knows its age stops working after 180 days
        assert headers["Content-Security-Policy"].startswith("default-src 'self' ")
        assert "consent=1" in headers["Set-Cookie"]
        assert get(f"{url}/data/{view.name}") == (200, view.read_bytes())
        assert get(f"{url}/onnx.js")[0] == 200
        for path in ("/data/manifest.json", f"/data/../{view.name}", "/../../../../../etc/passwd", "/data/"):
            assert get(url + path)[0] == 404


def test_only_this_machine_is_served(view: Path) -> None:
    with netron.server_for(view) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_a_taken_port_is_said(view: Path) -> None:
    with netron.server_for(view) as server, pytest.raises(InputError, match=f"port {server.server_port} cannot be"):
        netron.server_for(view, server.server_port)
    with pytest.raises(InputError, match="port 70000 cannot be served"):
        netron.server_for(view, 70000)


def test_a_browser_that_leaves_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "large.onnx").open("wb") as file:
        file.truncate(64 << 20)
    with served(tmp_path / "large.onnx") as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as browser:
            browser.sendall(b"GET /data/large.onnx HTTP/1.0\r\n\r\n")
            assert browser.recv(15).startswith(b"HTTP/1.0 200 OK")
        time.sleep(0.5)
        assert get(f"{url}/index.js")[0] == 200
    assert capsys.readouterr().err == ""


def test_without_netron_it_says_what_to_install(
    view: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(netron, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=re.escape("pip install 'optimize[netron]'")):
        netron.serve(view)
    assert cli.main(["inspect", str(view), "--serve"]) == 3
    assert "Netron is not installed" in capsys.readouterr().err


def test_the_command_serves_until_it_is_interrupted(demo_bundle: Path, view: Path) -> None:
    listening = ["env", "--default-signal=INT"]  # what runs the tests may ignore it, and hand that on
    words = [sys.executable, "-m", "optimize.tools.cli", "inspect", str(demo_bundle), "--component", "unet", "--serve"]
    with subprocess.Popen([*listening, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            url = process.stdout.readline().strip()
            assert get(f"{url}/data/{view.name}")[0] == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_the_view_has_no_weights_and_a_file_is_served_itself(demo_bundle: Path, view: Path) -> None:
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    assert view == demo_bundle / manifest["artifacts"]["unet/fp32/view"]["path"]
    whole = onnx.load(demo_bundle / "unet" / "unet.fp32.onnx", load_external_data=False)
    external = {i.name for i in whole.graph.initializer if i.external_data}
    assert {i.name for i in onnx.load(view).graph.initializer if not i.raw_data} == external != set()
    assert inspecting.view_at(demo_bundle / "unet" / "unet.fp32.onnx", None, None).name == "unet.fp32.onnx"
    with pytest.raises(InputError, match=r"which graph\?(.|\n)*text_encoder, unet"):
        inspecting.view_at(demo_bundle, None, None)


# --- one block -------------------------------------------------------------------------------------------------------


def test_one_block_of_the_unet(
    demo_bundle: Path, view: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "block.onnx"
    assert cli.main(["inspect", str(demo_bundle), "--component", "unet", "--block", str(out)]) == 0
    path = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert capsys.readouterr().out == f"{out}: {path}, 27 nodes, one of 4 alike\n"
    graph, block = onnx.load(view).graph, onnx.load(out).graph
    expected = [n for n in graph.node if n.name.startswith((path + "/", path + "."))]
    assert [(n.op_type, n.name, list(n.input)) for n in block.node] == [
        (n.op_type, n.name, list(n.input)) for n in expected
    ]
    assert [i.name for i in block.input] == ["down_blocks.0.attentions.0/Reshape", "encoder_hidden_states"]
    assert [o.name for o in block.output] == [f"{path}/Add_2"]
    assert len({n.name.split("transformer_blocks")[0] for n in graph.node if "transformer_blocks" in n.name}) == 4
    assert {i.name for i in block.initializer} < {i.name for i in graph.initializer}
    assert out.stat().st_size < 40_000


def test_a_foreign_graphs_block_loses_its_weights(demo_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(demo_bundle / "unet" / "unet.fp32.onnx")  # with its weights, 3 MB
    onnx.save(model, tmp_path / "whole.onnx")
    made = netron.block_of(tmp_path / "whole.onnx", tmp_path / "block.onnx")
    block = onnx.load(made.file)
    assert (made.nodes, made.alike) == (len(block.graph.node), 4)
    original = {i.name: i for i in model.graph.initializer}
    for initializer in block.graph.initializer:
        assert initializer.dims == original[initializer.name].dims
        assert len(initializer.raw_data) <= 1024
    assert any(not i.raw_data for i in block.graph.initializer)


def test_a_graph_without_repetition_has_no_block(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["": 23]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    with pytest.raises(InputError, match="no block of the graph repeats"):
        netron.block_of(tmp_path / "g.onnx", tmp_path / "block.onnx")
    assert not (tmp_path / "block.onnx").exists()
