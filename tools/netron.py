"""Graphs in the browser, and one repeated block of a graph as a small file.

Netron's page asks ipinfo.io where it is, reports to an analytics host, and stops working when its release is 180 days
old. So its files are served from here, with a policy under which the page talks to this server alone.
"""

from __future__ import annotations

import html
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from optimize.errors import InputError, MissingError

if TYPE_CHECKING:
    import onnx_ir as ir

HOST = "127.0.0.1"
POLICY = "default-src 'self' 'unsafe-inline' data: blob:"
SMALL_BYTES = 1024  # constants up to this size stay in a block's file: Netron shows them


# --- serving ---------------------------------------------------------------------------------------------------------


def netron_folder() -> Path:
    spec = find_spec("netron")
    if spec is None or spec.origin is None:
        raise MissingError("Netron is not installed", mend="pip install 'optimize[netron]'")
    return Path(spec.origin).parent


def page_for(file: Path, folder: Path) -> bytes:
    """Netron's page, told which file to open; without its date, it does not mind its age."""
    page = re.sub(r'<meta name="date"[^>]*>', "", (folder / "index.html").read_text())
    opened = (
        f'<meta name="type" content="Python">\n<meta name="file" content="/data/{quote(file.name)}">\n'
        f'<meta name="identifier" content="{html.escape(file.name)}">\n'
    )
    return page.replace("<title>", opened + "<title>", 1).encode()


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def server_for(path: Path, port: int = 0) -> Server:
    """A server of Netron with `path` open, on this machine's own address alone; port 0 takes a free one.

    Raises MissingError without Netron, InputError where the port is taken.
    """
    folder = netron_folder()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def do_GET(self) -> None:
            asked = urlsplit(self.path).path
            if asked in ("/", "/index.html"):
                page = page_for(path, folder)
                self.start("text/html; charset=utf-8", len(page))
                self.wfile.write(page)
            elif asked == f"/data/{quote(path.name)}":
                self.start("application/octet-stream", path.stat().st_size)
                with path.open("rb") as file:
                    shutil.copyfileobj(file, self.wfile)
            else:
                super().do_GET()

        def start(self, kind: str, size: int) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(size))
            self.end_headers()

        def end_headers(self) -> None:
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("Set-Cookie", "consent=1; Path=/; SameSite=Strict")  # nothing is reported: nothing to ask
            super().end_headers()

        def log_message(self, *_: Any) -> None:
            """Requests are no results: nothing is printed."""

    try:
        return Server((HOST, port), Handler)
    except (OSError, OverflowError) as e:
        raise InputError(
            f"port {port} cannot be served", got=str(e), mend="another --port, or none for a free one"
        ) from e


def serve(path: Path, port: int = 0) -> None:
    """Serves Netron with `path` open until Ctrl-C; its address goes to stdout."""
    with server_for(path, port) as server:
        print(f"http://{HOST}:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


# --- one block -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block that was written: its module's `path`, its number of nodes, and how many `alike` the graph has."""

    file: Path
    path: str
    nodes: int
    alike: int


def block_of(path: Path, out: Path) -> Block:
    """Writes the block that repeats most in the graph `path` as a graph of its own, without weights, for viewing.

    Raises InputError where no block repeats, or `out` cannot be written.
    """
    import onnx_ir as ir

    from optimize.compile.bundle import disk_errors
    from optimize.tools.graphs import model_from_file

    model = model_from_file(path)
    name, nodes, alike = repeated_block(model.graph)
    block = ir.convenience.extract(model.graph, *borders_of(nodes))
    block.name = name
    strip(block)
    if out.is_dir():
        raise InputError(f"{out} is a folder", expected="a file to write")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        functions = list(model.functions.values())
        block.opset_imports.update(model.opset_imports)
        ir.save(
            ir.Model(block, ir_version=model.ir_version, producer_name=model.producer_name, functions=functions), out
        )
    return Block(out, name, len(block), alike)


def repeated_block(graph: ir.Graph) -> tuple[str, list[ir.Node], int]:
    """The modules with a number for a name (`layers.3`) that together hold most of the graph, being alike: one of
    them, its nodes, and how many there are. Alike are those of the same operators."""
    from optimize.tools.fusions import path_of

    modules: dict[str, list[ir.Node]] = {}
    for node in graph:
        parts = path_of(node).split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                modules.setdefault(".".join(parts[: i + 1]), []).append(node)
    alike: dict[frozenset[tuple[str, int]], list[str]] = {}
    for name, nodes in modules.items():
        alike.setdefault(frozenset(Counter(n.op_type for n in nodes).items()), []).append(name)
    repeated = [names for names in alike.values() if len(names) > 1]
    if not repeated:
        raise InputError("no block of the graph repeats", got=f"{len(modules)} numbered modules, each different")
    names = max(repeated, key=lambda found: len(found) * len(modules[found[0]]))
    return names[0], modules[names[0]], len(names)


def borders_of(nodes: Sequence[ir.Node]) -> tuple[list[ir.Value], list[ir.Value]]:
    """What comes into the nodes from outside (weights are no inputs), and what of them is used outside."""
    inside = set(nodes)
    inputs = {
        v: None
        for node in nodes
        for v in node.inputs
        if v is not None and not v.is_initializer() and v.producer() not in inside
    }
    outputs = [
        v
        for node in nodes
        for v in node.outputs
        if v.is_graph_output() or any(use.node not in inside for use in v.uses())
    ]
    return list(inputs), outputs


def strip(graph: ir.Graph) -> None:
    """Large constants keep their shape and type, and lose their numbers."""
    import onnx
    import onnx_ir as ir

    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > SMALL_BYTES:
            dims = [int(d) for d in tensor.shape.numpy()]
            value.const_value = ir.serde.TensorProtoTensor(
                onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=dims)
            )
