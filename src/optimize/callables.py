"""Functions and torch modules of somebody's own, measured beside each other and through torch.compile, in place."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError
from optimize.measuring import Here, wrong
from optimize.progress import Progress
from optimize.seats import Seat

if TYPE_CHECKING:
    import torch

    from optimize.profiles.schema import Profile, Row, RowParity
    from optimize.profiling import Request

    Tensors = Mapping[str, torch.Tensor]

COMPILED = ("torch.compile", "torch.compile-max-autotune", "torch.compile-cudagraphs")


class Called:
    """A runner of a plain callable. `bind` gives one call of it; `style` is a row of `compile.compiled.STYLES`."""

    name = "function"

    def __init__(self, function: Callable[..., Any], inputs: Any, style: str | None, device: str) -> None:
        self.function, self.inputs, self.style, self.device = function, inputs, style, device

    def __enter__(self) -> Called:
        import torch

        from optimize.compile.compiled import STYLES

        if isinstance(self.function, torch.nn.Module):
            self.function.to(self.device)
        if self.style is not None:
            torch._dynamo.reset()
            self.function = torch.compile(self.function, dynamic=False, **STYLES[self.style].words)
        return self

    def __exit__(self, *error: Any) -> None:
        self.function = lambda: None

    def bind(self, feeds: Any = None) -> Callable[[], dict[str, torch.Tensor]]:
        import torch

        args, words = self.moved()

        def run() -> dict[str, torch.Tensor]:
            with torch.inference_mode():
                return tensors_in(self.function(*args, **words))

        return run

    def infer(self, feeds: Any = None) -> dict[str, torch.Tensor]:
        return self.bind()()

    def moved(self) -> tuple[list[Any], dict[str, Any]]:
        def at_home(value: Any) -> Any:
            return value.to(self.device) if hasattr(value, "to") else value

        if isinstance(self.inputs, Mapping):
            return [], {n: at_home(v) for n, v in self.inputs.items()}
        return [at_home(v) for v in self.inputs], {}


class CallSeat(Seat):
    """A seat whose inputs are at hand, and whose outputs stay in memory."""

    def bind(self, feeds: str = "") -> dict[str, Any]:
        with self.counted():
            self.run = self.runner.bind()
            return {"first_ms": self.once(), "second_ms": self.once(), "cached": False}

    def found(self) -> Tensors:
        assert self.run is not None
        return {n: t.detach().cpu().clone() for n, t in self.run().items()}


def tensors_in(value: Any) -> dict[str, torch.Tensor]:
    """Every tensor of what a call gave, by its place: `output`, `output.0`, `output.sample`."""
    import torch
    from torch.utils._pytree import keystr, tree_flatten_with_path

    leaves, _ = tree_flatten_with_path(dict(value) if isinstance(value, Mapping) else value)
    return {f"output{keystr(path)}": leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def profile_callables(what: Any, inputs: Any, request: Request, progress: Progress, folder: Path | None) -> Profile:
    """The first callable is the reference: others, and what torch.compile makes of each, are held to its outputs.

    Raises InputError for words that only bundles and sources take, and for callables that give no tensors.
    """
    from optimize.profiles.limits import limits_here
    from optimize.profiles.machine import Meter, machine_here
    from optimize.profiles.reading import RECORD, write_profile
    from optimize.profiles.schema import Profile
    from optimize.profiles.timing import on_cores

    functions = named(what)
    check(request, inputs)
    meter = Meter(request.device)
    with progress.step("profile " + ", ".join(functions)), on_cores(request.threads):
        rows = rows_of_callables(functions, inputs if inputs is not None else (), request, progress)
    with progress.step("limits of this device"):
        limits = limits_here(request.device, request.threads)
    load = meter.load()
    record = Profile(
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        source=", ".join(functions),
        command="optimize.profile(...)",
        machine=machine_here(request.device, request.threads),
        load=load,
        settings=request.settings,
        limits=limits,
        rows=tuple(rows),
    )
    if folder is not None:
        write_profile(record, folder / RECORD)
    return record


def named(what: Any) -> dict[str, Callable[..., Any]]:
    if isinstance(what, Mapping):
        wrong = [str(n) for n, f in what.items() if not callable(f)]
        if wrong or not what:
            raise InputError("these are no functions", got=", ".join(wrong) or "none", expected="callables by name")
        return dict(what)
    return {getattr(what, "__name__", type(what).__name__): what}


def check_words(**words: Any) -> None:
    """Raises InputError for what functions cannot be given: nothing that is asked for is dropped."""
    for word, value in words.items():
        if value not in (None, (), []):
            raise InputError(f"{word} is for bundles and sources", got=value, mend="leave it out")


def check(request: Request, inputs: Any) -> None:
    check_words(precisions=request.precisions, shapes=request.shapes, targets=request.targets)
    known = ("eager", *COMPILED)
    if unknown := [b for b in request.backends if b not in known]:
        raise InputError(
            f"{unknown[0]} does not take a function",
            expected=", ".join(known),
            mend="export the module (`optimize export python:package.module:factory`) to compare the others",
        )
    if inputs is not None and not isinstance(inputs, Mapping | Sequence):
        raise InputError(
            "inputs are neither a sequence nor a mapping", got=type(inputs).__name__, expected="(x, y) or {'x': x}"
        )


def rows_of_callables(
    functions: Mapping[str, Callable[..., Any]], inputs: Any, request: Request, progress: Progress
) -> list[Row]:
    """Each function through each backend; rows stand under the function's name."""
    from optimize.profiles.timing import SideFailedError, measure, pace_of

    backends = request.backends or ("eager",)
    seats: dict[tuple[str, str], CallSeat] = {}
    parity: dict[tuple[str, str], RowParity] = {}
    exact: Tensors | None = None
    firsts, loads, broken = dict[tuple[str, str], Any](), dict[tuple[str, str], float](), dict[tuple[str, str], str]()
    for name, function in functions.items():
        for backend in dict.fromkeys(("eager", *backends) if not seats else backends):
            style = None if backend == "eager" else backend
            seat = CallSeat(partial(Called, function, inputs, style, request.device), request.device)
            progress.say(f"{name}: {backend}")
            key, place = (name, backend), Here(seat)
            seats[key] = seat
            try:
                loads[key], firsts[key] = place.call("open")["load_s"], place.call("bind")
                got = place.call("found")
            except SideFailedError as e:
                if exact is None:  # what the reference raises is for its author, as it is
                    cause = e.__cause__ or e
                    raise cause from cause.__cause__
                broken[key] = " ".join(str(e).split())
                continue
            exact = got if exact is None else exact
            parity[key] = compared(got, exact, request.device)
            if not parity[next(iter(seats))].passed:
                raise InputError(
                    "the first function's outputs are not finite",
                    got=wrong(parity[key]),
                    expected="numbers that the others can be held to",
                    mend="look at it with these inputs",
                )
    right = {key: seat for key, seat in seats.items() if key in parity and parity[key].passed}
    places = {" ".join(reversed(key)): Here(seat) for key, seat in right.items()}
    first = next(iter(places))
    measured = measure(
        places,
        {" ".join(reversed(key)): parity[key] for key in right},
        request.settings,
        device=request.device,
        reference=first,
        say=progress.say,
        pace=pace_of(request.device, request.threads),
    )
    return [
        row(key, seat, parity.get(key), measured, loads.get(key, 0.0), firsts.get(key), inputs, broken.get(key, ""))
        for key, seat in seats.items()
    ]


def compared(got: Tensors, exact: Tensors, device: str) -> RowParity:
    from optimize.profiles.judging import parity_of_row

    if not exact:
        raise InputError("the function gives no tensor", expected="a tensor, or a structure that holds some")
    low = {str(t.dtype).removeprefix("torch.") for t in exact.values()} & {"float16", "bfloat16"}
    return parity_of_row(got, exact, None, "other" if low else "fp32", device)


def row(
    key: tuple[str, str],
    seat: CallSeat,
    parity: RowParity | None,
    measured: Any,
    load_s: float,
    first: Any,
    inputs: Any,
    why: str,
) -> Row:
    from optimize.profiles.schema import Memory, Preparation, Row

    name, backend = key
    label = f"{backend} {name}"
    known: dict[str, Any] = {
        "component": name,
        "role": "function",
        "shape": "given",
        "sizes": sizes_of(inputs),
        "backend": backend,
        "precision": "as it is",
        "parity": parity,
    }
    if label not in measured.timings:
        return Row(**known, state="failed", why=why or measured.failed.get(label) or wrong(parity))
    timing = measured.timings[label]
    compiled = backend != "eager"
    return Row(
        **known,
        state="measured" if timing.stable else "inconclusive",
        timing=timing,
        ratio=measured.ratios.get(label),
        preparation=Preparation(
            load_s=load_s,
            compile_s=max(0.0, first["first_ms"] - first["second_ms"]) / 1e3 if compiled else None,
            first_ms=first["second_ms"] if compiled else first["first_ms"],
        ),
        memory=Memory(**seat.memory()) if seat.device == "cuda" else None,
        energy_j=measured.energy_j.get(label),
        throughput_per_s=1e3 / timing.median_ms,
    )


def sizes_of(inputs: Any) -> dict[str, int]:
    named = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return {f"{n}.{i}": int(d) for n, t in named if hasattr(t, "shape") for i, d in enumerate(t.shape)}
