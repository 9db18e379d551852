"""A graph in memory, its weights in a file beside, run in ONNX Runtime with any of its values as outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from optimize.compile.runners import CPU, NUMPY_OF_ORT, SLOW_ON_CPU, Feeds

FOLDER = "session.model_external_initializers_file_folder_path"
NO_QDQ = "session.disable_quant_qdq"
"""Set to "1", Q and DQ nodes run as they are written: no int8 kernel takes their place."""


def session_options(optimized: Path | None = None, threads: int = 0, **entries: str) -> Any:
    """ONNX Runtime's options as every session here has them. `optimized` is where the optimized graph is written."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return options


class GraphSession:
    """`graph` with its external weights in `folder`. `taps` are values that come out beside the graph's outputs."""

    def __init__(self, graph: ir.Model, folder: Path, taps: Iterable[str] = (), options: Any = None) -> None:
        import onnxruntime as ort

        model = ir.serde.serialize_model(graph)
        there = {o.name for o in model.graph.output}
        kinds = {str(v.name): v.dtype for v in values_of(graph)}
        for name in dict.fromkeys(taps):
            if name not in there:
                out = model.graph.output.add(name=name)
                out.type.tensor_type.elem_type = int(kinds[name] or ir.DataType.FLOAT)
        options = options or session_options()
        options.add_session_config_entry(FOLDER, str(folder))
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=[CPU], disabled_optimizers=SLOW_ON_CPU
        )
        self.kinds = {i.name: NUMPY_OF_ORT[i.type] for i in self.session.get_inputs()}
        self.optional = {i.name: NUMPY_OF_ORT[i.type] for i in self.session.get_overridable_initializers()}

    def run(self, feeds: Feeds, names: Sequence[str] | None = None, extra: Mapping[str, Any] = {}) -> dict[str, Any]:
        """Values by name, torch tensors. `extra` overrides initializers that are inputs too."""
        arrays: dict[str, Any] = {n: feeds[n].numpy().astype(kind, copy=False) for n, kind in self.kinds.items()}
        arrays |= {n: np.asarray(v).astype(self.optional[n], copy=False) for n, v in extra.items()}
        wanted = list(names) if names is not None else [o.name for o in self.session.get_outputs()]
        found = self.session.run(wanted, arrays)
        return {n: torch.from_numpy(np.asarray(v)) for n, v in zip(wanted, found, strict=True)}


def values_of(graph: ir.Model) -> Iterable[ir.Value]:
    """Inputs and the results of all nodes."""
    yield from graph.graph.inputs
    for node in graph.graph:
        yield from node.outputs
