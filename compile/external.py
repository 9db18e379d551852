"""Weights in the graph, and their file: a safetensors file that ONNX Runtime, TensorRT and torch read in place.

A weight stays a recipe (which tensor of the source, as what type, turned how) until it is written; then one at a time
passes through memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from .translate import TYPES, raw_array
from .weights import Weights

INLINE_BYTES = 1024  # smaller tensors stay in the graph, where Netron shows them

SAFETENSORS_TYPES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.DOUBLE: "F64",
    ir.DataType.INT64: "I64",
    ir.DataType.INT32: "I32",
    ir.DataType.INT16: "I16",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT8: "U8",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.INT4: "U8",  # two in a byte, the file's type for bytes
}


@dataclass(frozen=True)
class Recipe:
    """A tensor of the source (`name`), in the type `dtype`, its dimensions in the order `perm`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    perm: tuple[int, ...] | None = None

    def make(self, weights: Weights) -> torch.Tensor:
        tensor = weights.tensor(self.name).detach().to(self.dtype).reshape(self.shape)
        return (tensor.permute(self.perm) if self.perm else tensor).contiguous()


class WeightTensor(ir.LazyTensor):
    """An initializer that is read from the source when somebody asks for its numbers."""

    def __init__(self, recipe: Recipe, weights: Weights) -> None:
        self.recipe, self.weights = recipe, weights
        shape = [recipe.shape[i] for i in recipe.perm] if recipe.perm else recipe.shape
        super().__init__(
            lambda: ir.tensor(raw_array(recipe.make(weights)), dtype=TYPES[recipe.dtype]),
            dtype=TYPES[recipe.dtype],
            shape=ir.Shape(shape),
            name=recipe.name,
            cache=False,
        )

    def permuted(self, perm: tuple[int, ...]) -> WeightTensor:
        old = self.recipe.perm or tuple(range(len(self.recipe.shape)))
        new = tuple(old[i] for i in perm)
        kept = None if new == tuple(range(len(new))) else new
        return WeightTensor(Recipe(self.recipe.name, self.recipe.dtype, self.recipe.shape, kept), self.weights)


def weight_maker(
    weights: Weights, same_as: Mapping[str, str]
) -> Callable[[str, tuple[int, ...], torch.dtype], WeightTensor]:
    """What the translator asks for initializers. `same_as` maps a tied name to the one that is stored."""
    return lambda name, shape, dtype: WeightTensor(Recipe(same_as.get(name, name), dtype, shape), weights)


def externals(model: ir.Model) -> dict[str, ir.Value]:
    """Initializers that belong in the weights' file, by the key that they get there."""
    found = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < INLINE_BYTES:
            continue
        key = str(value.name)
        if isinstance(tensor, WeightTensor) and tensor.recipe.perm:
            key += ".T" if tensor.recipe.perm == (1, 0) else f".perm{''.join(map(str, tensor.recipe.perm))}"
        found[key] = value
    return found


def ordered(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The large tensors by key, the largest first."""
    found = {key: value.const_value for key, value in externals(model).items() if value.const_value is not None}
    return dict(sorted(found.items(), key=lambda item: (-item[1].nbytes, item[0])))


def header_of(model: ir.Model, metadata: Mapping[str, str] | None = None) -> bytes:
    """The safetensors header of the model's large tensors, padded so that data starts at a multiple of 64 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for key, tensor in ordered(model).items():
        header[key] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype],
            "shape": [tensor.nbytes] if tensor.dtype == ir.DataType.INT4 else [int(d) for d in tensor.shape.numpy()],
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % 64)


def header_bytes(path: Path) -> bytes:
    """The header of a safetensors file as it stands there."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def entries_of(header: bytes) -> dict[str, object]:
    """The header's tensors without its metadata."""
    return {k: v for k, v in json.loads(header).items() if k != "__metadata__"}


def write_weights(
    model: ir.Model, path: Path, metadata: Mapping[str, str], progress: Callable[[int, int], None]
) -> None:
    """Streams the model's large tensors into `path`, one at a time; `progress(done_bytes, all_bytes)` after each."""
    header = header_of(model, metadata)
    tensors = ordered(model)
    total, done = sum(t.nbytes for t in tensors.values()), 0
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            data = tensor.recipe.make(tensor.weights) if isinstance(tensor, WeightTensor) else None
            file.write(data.reshape(-1).view(torch.uint8).numpy().data if data is not None else tensor.tobytes())
            done += tensor.nbytes
            progress(done, total)


def point_at(model: ir.Model, location: str, header: bytes) -> None:
    """Makes every large tensor of the graph a reference into the weights' file `location` beside the graph."""
    entries = json.loads(header)
    start = 8 + len(header)
    for key, value in externals(model).items():
        tensor = value.const_value
        assert tensor is not None
        low, high = entries[key]["data_offsets"]
        value.const_value = ir.ExternalTensor(
            location,
            start + low,
            high - low,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(value.name),
            base_dir="",
        )


def inline_small(model: ir.Model) -> None:
    """Weights too small for the file are put into the graph itself."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, WeightTensor) and tensor.nbytes < INLINE_BYTES:
            value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=str(value.name))


def stripped(model: ir.Model) -> ir.Model:
    """The graph with shapes and types but no large numbers, for viewers."""
    copy = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            empty = onnx.TensorProto(
                name=str(value.name), data_type=int(tensor.dtype), dims=[int(d) for d in tensor.shape.numpy()]
            )
            value.const_value = ir.serde.TensorProtoTensor(empty)
    return copy
