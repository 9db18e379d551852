"""What a profile's record says (`profile.json`): measurements, where their time went, estimates, and the answer.

Pure data, checked when read. Times are milliseconds, sizes bytes, rates GFLOP/s and GB/s, unless a name says otherwise.
A measurement cannot be built without a parity: `Row` refuses a state of "measured" that has none.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from optimize.compile.records import Record

SCHEMA = 1

State = Literal["measured", "inconclusive", "failed", "skipped"]


class Gpu(Record):
    """A GPU as the driver describes it at the start; None is what it does not tell."""

    name: str
    sm: int
    memory_bytes: int
    driver: str
    power_limit_w: float | None = None
    clock_sm_mhz: float | None = None
    clock_sm_max_mhz: float | None = None
    clock_memory_mhz: float | None = None
    temperature_c: float | None = None
    persistence: bool | None = None


class Load(Record):
    """What the machine did meanwhile. `others` is the share of all cores that other processes took, `stolen` the share
    that its host gave to others; `busy` says that figures are suspect. GPU values are (lowest, highest) seen."""

    seconds: float
    others: float
    stolen: float
    busy: bool
    gpu_clock_sm_mhz: tuple[float, float] | None = None
    gpu_temperature_c: tuple[float, float] | None = None
    gpu_throttled: tuple[str, ...] = ()


class Machine(Record):
    """Where it was measured. `key` is the same for machines whose figures may be compared."""

    key: str
    device: Literal["cpu", "cuda"]
    cpu: str
    cores: int
    threads: int
    vector: list[str]
    memory_bytes: int
    system: str
    gpu: Gpu | None = None
    versions: dict[str, str]
    commit: str = ""


class Limits(Record):
    """The roof over a device: `measured` was found by running (copy and matmul), `sheet` is from the vendor's paper.

    `peak_gflops` is by precision (fp32, tf32, fp16, bf16, fp8, int8); `bandwidth_gbs` of main memory."""

    target: str
    how: Literal["measured", "sheet"]
    bandwidth_gbs: float
    peak_gflops: dict[str, float]
    sources: tuple[str, ...] = ()


class Settings(Record):
    """How it was measured: `rounds` interleaved rounds in random order, in each a burst of `burst_ms` per candidate
    after `warmup_ms`; at most `attempts` times, until first and last rounds agree within `drift` and the spread of the
    rounds' medians is at most `spread`. On a CPU candidates take turns of `turn_ms` in a burst (0: none, a burst is
    whole), and a turn beside which a fixed piece of work is slower than at its best by more than `pace` is put off or
    made again, for at most `patience` times as long as measuring takes."""

    rounds: int
    burst_ms: float
    warmup_ms: float
    attempts: int
    drift: float
    spread: float
    seed: int
    cold_cache: bool = False
    samples: int = 0
    turn_ms: float = 0.0
    pace: float = 0.0
    patience: float = 0.0


class Timing(Record):
    """Latency of warm runs. `rounds_ms` has each round's median, in order, and `median_ms` is their median; percentiles
    are over all runs. `spread` is (p90 - p10) / median of `rounds_ms`, `drift` the median of their last third over that
    of the first, less one. `stable` is the rule of `Settings`. `disturbed` rounds stayed beside a slower pace of the
    machine, however often they were made again."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    runs: int
    rounds_ms: list[float]
    spread: float
    drift: float
    attempts: int
    stable: bool
    disturbed: int = 0
    clock: Literal["cuda events", "monotonic"]
    cpu_ms: float | None = None
    """Processor time of all threads per run; on a shared machine it tells work from waiting."""


class Ratio(Record):
    """This row's latency over the reference's (`to`), round by round: the median, and the lowest and highest tenth."""

    to: str
    value: float
    low: float
    high: float


class RowParity(Record):
    """This backend's outputs on this machine, at these sizes, against eager fp32 on the same feeds."""

    output: str
    relative: float
    limit: float
    rule: str
    passed: bool


class RowQuality(Record):
    """The worst output beside eager fp32's: means over the samples, and the lowest cosine. `data` says of what."""

    output: str
    cosine: float
    lowest: float
    snr_db: float
    psnr_db: float
    samples: int
    data: str


class Memory(Record):
    """Peaks in bytes while this candidate alone was loaded and run; `host` is above what the bare process had."""

    host: int | None = None
    device: int | None = None


class Preparation(Record):
    """Before the first warm run: `load_s` from file to ready, `compile_s` (torch.compile, AOTInductor) or `build_s`
    (an engine), `first_ms` the first run after these. `cached` says that a compiler's cache on disk was used."""

    load_s: float = 0.0
    compile_s: float | None = None
    build_s: float | None = None
    first_ms: float = 0.0
    cached: bool = False
    artifact_bytes: int | None = None


class Work(Record):
    """What one run computes, counted from the graph at these sizes: operations (a multiply-add is two) and the least
    bytes that have to move (weights once, the component's inputs and outputs). `unfused_bytes` is what moves where
    every node reads its inputs and writes its output; `flops_by_type` splits `flops` by what they are computed in."""

    flops: float
    bytes: float
    weight_bytes: float
    how: str
    unfused_bytes: float | None = None
    flops_by_type: dict[str, float] = Field(default_factory=dict)


class Roofline(Record):
    """Achieved rates, and the share of what the limits allow for this work: `bound` is the resource that limits it."""

    gflops: float
    gbs: float
    intensity: float
    share: float
    bound: Literal["compute", "memory"]
    precision: str


class Row(Record):
    """One candidate (backend x precision) of one component at one set of sizes.

    `measured` and `inconclusive` rows have timing and a passed parity; `failed` and `skipped` ones say `why`."""

    component: str
    role: str
    shape: str
    sizes: dict[str, int]
    backend: str
    precision: str
    artifact: str | None = None
    sha256: str | None = None
    state: State
    why: str = ""
    parity: RowParity | None = None
    quality: RowQuality | None = None
    timing: Timing | None = None
    ratio: Ratio | None = None
    preparation: Preparation | None = None
    memory: Memory | None = None
    energy_j: float | None = None
    throughput_per_s: float | None = None
    work: Work | None = None
    roofline: Roofline | None = None
    notes: tuple[str, ...] = ()

    @property
    def candidate(self) -> str:
        return f"{self.backend} {self.precision}".strip()

    @property
    def base(self) -> str:
        """The precision alone: `fp32+kernels` -> `fp32`."""
        return self.precision.partition("+")[0]

    @model_validator(mode="after")
    def proved(self) -> Self:
        timed = self.state in ("measured", "inconclusive")
        if timed and (self.timing is None or self.parity is None or not self.parity.passed):
            raise ValueError(f"{self.component} {self.candidate}: a figure without a passed parity")
        if not timed and (self.timing is not None or not self.why):
            raise ValueError(f"{self.component} {self.candidate}: {self.state}, and no reason")
        return self


class OperatorTime(Record):
    """A kind of work in one module: milliseconds per run. `module` is the torch module's path ("" where the backend
    does not tell), `operator` the kind (convolution, matmul, attention, norm, ...), `kernel` what ran it."""

    module: str
    operator: str
    kernel: str
    ms: float
    calls: float
    provider: str = ""
    flops: float | None = None
    bytes: float | None = None


class Breakdown(Record):
    """Where one candidate's time goes. `outside_ms` is the run's time in no kernel: launch gaps, waiting, copies."""

    component: str
    shape: str
    backend: str
    precision: str
    run_ms: float
    outside_ms: float
    operators: list[OperatorTime]
    how: str
    trace: str | None = None
    """File name of a Chrome trace beside the record."""


class Estimate(Record):
    """NOT measured: what the roofline of a target that is not here allows, at an assumed share of it."""

    target: str
    component: str
    shape: str
    precision: str
    latency_ms: float
    bound: Literal["compute", "memory"]
    share: float
    assumptions: list[str]


class PipelinePart(Record):
    component: str
    candidate: str
    calls: float
    ms: float


class PipelineTime(Record):
    """Time of one image. `composed_ms` sums component latencies times calls; `measured_ms` is an end-to-end run of the
    same parts, where there was one. `variant` names what the parts ran as."""

    variant: str
    shape: str
    steps: int
    guidance: bool
    parts: list[PipelinePart]
    composed_ms: float
    measured_ms: float | None = None
    rounds_ms: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


class Pick(Record):
    """One component's choice, with the reason."""

    component: str
    shape: str
    backend: str
    precision: str
    artifact: str | None = None
    latency_ms: float
    cosine: float | None = None
    memory_bytes: int | None = None
    why: str
    runner_up: str = ""


class Cost(Record):
    """Money: `per_1000` runs (images, for a pipeline), and `per_month` for a load, on as many machines as it takes."""

    price_per_hour: float
    per_1000: float
    load_per_second: float | None = None
    machines: int | None = None
    per_month: float | None = None
    currency: str = ""


class Choice(Record):
    """The answer under the wishes. `met` is False where nobody meets them: `picks` are the nearest then, `missed` says
    by how much. `front` has the candidates that no other beats in both latency and quality, by component."""

    wishes: list[str]
    met: bool
    missed: tuple[str, ...] = ()
    picks: list[Pick]
    front: dict[str, list[str]]
    pipeline: PipelineTime | None = None
    cost: Cost | None = None


class Change(Record):
    """A row beside the same one of an older record. `significant` where the difference is beyond both's own noise;
    "undecided" where the records cannot tell (a busy machine, rounds that do not agree), whatever the difference."""

    component: str
    shape: str
    candidate: str
    before_ms: float | None
    after_ms: float | None
    ratio: float | None
    significant: bool
    verdict: Literal["slower", "faster", "same", "undecided", "new", "gone"]
    why: str = ""


class Comparison(Record):
    against: str
    made: str
    changes: list[Change]
    notes: tuple[str, ...] = ()


class Profile(Record):
    """A whole record: `made` is when (ISO 8601, UTC), `source` what was profiled, `command` how to run it again."""

    schema_version: int = SCHEMA
    made: str
    source: str
    command: str
    machine: Machine
    load: Load
    settings: Settings
    limits: Limits | None = None
    rows: tuple[Row, ...] = ()
    breakdowns: tuple[Breakdown, ...] = ()
    pipelines: tuple[PipelineTime, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    choice: Choice | None = None
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()

    def as_rows(self) -> list[dict[str, Any]]:
        """Plain rows, one per candidate and set of sizes: what `pandas.DataFrame(profile.as_rows())` takes."""
        return [flat(row) for row in self.rows]

    def as_pandas(self) -> Any:
        """The same as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.as_rows())


def flat(row: Row) -> dict[str, Any]:
    timing, parity, quality, ready = row.timing, row.parity, row.quality, row.preparation
    return {
        "component": row.component,
        "shape": row.shape,
        "backend": row.backend,
        "precision": row.precision,
        "state": row.state,
        "why": row.why,
        "median_ms": timing.median_ms if timing else None,
        "p10_ms": timing.p10_ms if timing else None,
        "p90_ms": timing.p90_ms if timing else None,
        "p99_ms": timing.p99_ms if timing else None,
        "cpu_ms": timing.cpu_ms if timing else None,
        "ratio": row.ratio.value if row.ratio else None,
        "throughput_per_s": row.throughput_per_s,
        "parity": parity.relative if parity else None,
        "cosine": quality.cosine if quality else None,
        "snr_db": quality.snr_db if quality else None,
        "load_s": ready.load_s if ready else None,
        "compile_s": (ready.compile_s if ready.compile_s is not None else ready.build_s) if ready else None,
        "first_ms": ready.first_ms if ready else None,
        "host_bytes": row.memory.host if row.memory else None,
        "device_bytes": row.memory.device if row.memory else None,
        "energy_j": row.energy_j,
        "gflops": row.roofline.gflops if row.roofline else None,
        "gbs": row.roofline.gbs if row.roofline else None,
        "limit_share": row.roofline.share if row.roofline else None,
        **{f"size.{k}": v for k, v in row.sizes.items()},
    }
