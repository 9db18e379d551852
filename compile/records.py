"""What a bundle's manifest says: artifacts, how each was proved, and what made it. Pure data, checked when read."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from .spec import PRECISIONS, QUANTIZED

SCHEMA = 1


def inside(path: str) -> str:
    """A path that stays in the bundle: relative, with no way up."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not path:
        raise ValueError(f"the path {path!r} leaves the bundle")
    return path


InsidePath = Annotated[str, AfterValidator(inside)]


class Record(BaseModel):
    """Infinity (the SNR of what agrees in every bit) is written as a word: JSON has no number for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class OutputError(Record):
    """How far one output is from the reference. `relative` is the L2 norm of the difference over that of the
    reference, `worst` the largest difference over the largest magnitude; `eager` the same `relative` for eager in the
    artifact's own precision (None in fp32)."""

    name: str
    relative: float
    worst: float
    finite: bool
    eager: float | None = None


class ShapeParity(Record):
    """One set of sizes: `traced`, `untraced` or `smallest`."""

    name: str
    sizes: dict[str, int]
    outputs: list[OutputError]
    passed: bool


class Parity(Record):
    """An artifact against eager fp32 on the same feeds. `how` is "whole", or "N segments" run one after another."""

    backend: str
    reference: str
    how: str
    rule: str
    shapes: list[ShapeParity]
    passed: bool
    notes: list[str] = []

    @property
    def worst(self) -> float:
        return max((o.relative for s in self.shapes for o in s.outputs), default=0.0)


class Layer(Record):
    """A place that multiplies by weights (or an attention), its precision and why it has that. `error` is what its
    quantization alone does to the component's output (relative, L2), where that was measured; `gain` its millions of
    products per sample."""

    name: str
    module: str
    kind: str
    precision: str
    why: str = ""
    error: float | None = None
    gain: float | None = None


class Quality(Record):
    """One output against the base artifact's on held-out samples: means over them, and the lowest cosine."""

    output: str
    cosine: float
    lowest: float
    snr: float
    psnr: float
    samples: int


class Latency(Record):
    """Milliseconds, medians of interleaved runs in one process; `spread` is (p90 - p10) / median, the larger one."""

    base: float
    quantized: float
    rounds: int
    threads: int
    spread: float
    sizes: dict[str, int]

    @property
    def ratio(self) -> float:
        return self.quantized / self.base


class Receipt(Record):
    """What became of each layer that could be quantized. The counts must agree; `lost` names those that do not.

    `found` sites, of them `chosen` for few bits, `calibrated` (static schemes), `exported` with Q and DQ in the file,
    and `kernels`: nodes of the optimized ONNX Runtime graph that compute in integers, or layers of an engine.
    None where that stage does not apply. `smoothed` are activations, `split` layers with outlier channels apart."""

    scheme: str
    runtime: str
    base: str
    method: str
    data: str
    samples: int
    budget: str
    found: int
    chosen: int
    calibrated: int | None
    exported: int
    kernels: int | None
    lost: list[str] = []
    smoothed: int = 0
    split: int = 0
    checks: int = 0
    bytes_base: int
    bytes_quantized: int
    latency: Latency | None = None
    quality: list[Quality] = []
    layers: list[Layer] = []
    headline: str = ""


Kind = Literal["onnx", "weights", "view", "probe", "engine", "aoti"]


class Artifact(Record):
    """A file of the bundle. `key` names all that it depends on; `parents` are ids of artifacts it was made of."""

    id: str
    component: str
    kind: Kind
    path: InsidePath
    bytes: int
    sha256: str
    parents: list[str] = []
    spec: dict[str, Any] = {}
    key: dict[str, str] = {}
    versions: dict[str, str] = {}
    seconds: dict[str, float] = {}
    parity: Parity | None = None
    receipt: Receipt | None = None
    downgrades: list[str] = []
    notes: list[str] = []


class AxisRecord(Record):
    min: int
    opt: int
    max: int
    step: int


class TensorRecord(Record):
    name: str
    dtype: str
    shape: list[int | str]
    fill: str = "normal"


class ComponentRecord(Record):
    """A component as data: enough to feed and to read its artifacts without its source."""

    name: str
    role: str
    class_name: str
    axes: dict[str, AxisRecord]
    inputs: list[TensorRecord]
    outputs: list[str]


class Manifest(Record):
    """`manifest.json`. `trust` holds what the user allowed when it was made (`--allow-pickle`, ...)."""

    schema_version: int = SCHEMA
    source: str
    trust: list[str] = []
    components: dict[str, ComponentRecord] = {}
    artifacts: dict[str, Artifact] = {}

    @model_validator(mode="after")
    def consistent(self) -> Self:
        """Each artifact stands under its own id, belongs to a component and says what is read of it later."""
        for id_, artifact in self.artifacts.items():
            if id_ != artifact.id or artifact.component not in self.components:
                raise ValueError(f"artifact {id_} calls itself {artifact.id} of component {artifact.component}")
            if artifact.kind in ("onnx", "engine", "aoti") and artifact.spec.get("precision") not in (
                *PRECISIONS,
                *QUANTIZED,
            ):
                raise ValueError(f"artifact {id_} has the precision {artifact.spec.get('precision')}")
        return self
