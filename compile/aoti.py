"""AOTInductor packages: a component's module compiled ahead of time into one `.pt2` file, and the runner of it.

A package is native code for one kind of machine. What it was compiled for stands in its own metadata, which is read
before any of its code is loaded: elsewhere it would end the process with an illegal instruction.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from optimize.errors import GateError, InputError, MissingError, OptimizeError

from .backends import torch_missing
from .feeds import feeds_for
from .onnx_model import Clock
from .runners import Bound, Feeds, check_names, loaded_module
from .spec import Component, dim_terms
from .trace import dynamic_dims, fused

OPTIONS: Mapping[str, Any] = {
    "aot_inductor.package": True,
    # else the number of threads of the process that compiles is compiled in: one thread there is one thread for ever
    "cpp.dynamic_threads": True,
}
"""What Inductor is told beside its defaults."""
OURS = "optimize"
"""The package's metadata have a `Built` under this name."""
OUT_OF_MEMORY = ("can't allocate memory", "Invalid buffer size", "out of memory")


@dataclass(frozen=True)
class Built:
    """What a package was compiled for.

    `isa` is what Inductor writes its loops in, `instructions` all that the C++ compiler could use (it compiles for the
    very processor): a machine has to have every one of them. `sm` is the GPU's compute capability (90), 0 without.
    `axes` are (min, max, step) by name.
    """

    device: str
    precision: str
    torch: str
    machine: str
    isa: str
    instructions: tuple[str, ...]
    axes: Mapping[str, tuple[int, int, int]]
    sm: int = 0
    kernels: bool = False

    def key(self) -> dict[str, str]:
        """What an artifact's key says of it, by name; torch's version and the precision stand there already."""
        return {
            "device": f"sm{self.sm}" if self.sm else self.device,
            "isa": f"{self.machine} {self.isa}",
            "instructions": " ".join(self.instructions),
        }


@dataclass(frozen=True)
class Package:
    """A file that was made, what for, and what `--kernels` fused in it."""

    path: Path
    built: Built
    fusions: Mapping[str, Any] = field(default_factory=dict)


# --- machines --------------------------------------------------------------------------------------------------------


def instructions_here() -> tuple[str, ...]:
    """The sets of instructions of this processor, by torch's names: avx2, avx512_f, avx512_vnni, ..."""
    return tuple(sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True))


def sm_here() -> int:
    """The compute capability of the current GPU as one number (90)."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def built_here(component: Component, precision: str, device: str = "cpu") -> Built:
    """What a package that is made now is for. Raises MissingError where nothing can be compiled for `device`."""
    if why := torch_missing(device, compiled=True):
        raise MissingError(
            f"AOTInductor cannot compile for {device} here",
            got=why,
            mend="install what is missing, or leave out --format aoti",
        )
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return Built(
        device,
        precision,
        str(torch.__version__),
        platform.machine(),
        str(pick_vec_isa()),
        instructions_here(),
        {name: (a.min, a.max, a.step) for name, a in component.axes.items()},
        sm_here() if device == "cuda" else 0,
        component.kernels,
    )


def check_machine(built: Built, path: Path) -> None:
    """Raises MissingError where this machine is not one that the package was compiled for."""
    here, there = (".".join(version.split(".")[:2]) for version in (str(torch.__version__), built.torch))
    lacking = [name for name in built.instructions if name not in instructions_here()]
    if built.machine != platform.machine():
        got, expected = platform.machine(), built.machine
    elif lacking:
        got, expected = f"a processor without {', '.join(lacking)}", f"{built.isa}, and all that it was compiled with"
    elif here != there:
        got, expected = f"torch {torch.__version__}", f"torch {there}, whose interface its code calls"
    elif built.sm and not torch.cuda.is_available():
        got, expected = f"torch {torch.__version__} sees no GPU", f"a GPU of SM{built.sm}"
    elif built.sm and built.sm != sm_here():
        got, expected = f"a GPU of SM{sm_here()}", f"SM{built.sm}"
    else:
        return
    raise MissingError(
        f"{path.name} was compiled for another machine, and is not loaded",
        got=got,
        expected=expected,
        mend="export it on this machine: optimize export SOURCE --format aoti",
    )


def built_of(path: Path) -> Built:
    """What a package says of itself; none of its code is loaded. Raises InputError for a file that says nothing."""
    try:
        with zipfile.ZipFile(path) as file:
            name = next(n for n in file.namelist() if n.endswith(".wrapper_metadata.json"))
            words = json.loads(json.loads(file.read(name))[OURS])
        axes = {axis: tuple(sizes) for axis, sizes in words["axes"].items()}
        return Built(**{**words, "instructions": tuple(words["instructions"]), "axes": axes})
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path.name} is no AOTInductor package of ours",
            got=f"{type(e).__name__}: {e}",
            expected="a .pt2 file that says what machine it was compiled for",
            mend="optimize export SOURCE --format aoti",
        ) from e


# --- making ----------------------------------------------------------------------------------------------------------


def package_from_component(
    component: Component, precision: str, path: Path, device: str = "cpu", clock: Clock | None = None
) -> Package:
    """Exports the component's module with its weights and compiles it into `path` (`.pt2`).

    Takes three and a half times the weights in memory. Raises GateError where torch cannot export the module with its
    axes or Inductor cannot compile it, MissingError without a compiler.
    """
    clock = clock or Clock(lambda _: None)
    built = built_here(component, precision, device)
    with clock("export"):
        program, fusions = program_from_component(component, precision, device)
    with clock("compile"):
        package_from_program(program, path, built, component.name)
    return Package(path, built, fusions)


def program_from_component(
    component: Component, precision: str, device: str
) -> tuple[torch.export.ExportedProgram, Mapping[str, Any]]:
    """The module on its device, exported at the `traced` sizes with every axis that is not static left open."""
    from torch._dynamo import config

    module = loaded_module(component, precision)
    fusions = fused(module) if component.kernels else {}
    module.to(device)
    feeds = feeds_for(component.inputs, component.shape_sets()["traced"], precision)
    given = tuple(feeds[spec.name].to(device) for spec in component.inputs)
    dims: dict[str, Any] = {}
    dynamic = tuple(dynamic_dims(spec, component, dims) for spec in component.inputs)
    # fake tensors are not cached: with symbolic sizes that costs more than it saves
    uncached = config.patch(fake_tensor_cache_enabled=False)
    with refusals(component.name, "exported by torch.export"), uncached, torch.no_grad():
        return torch.export.export(module, given, dynamic_shapes={"tensors": dynamic}, strict=False), fusions


def package_from_program(program: torch.export.ExportedProgram, path: Path, built: Built, what: str) -> None:
    """Compiles an exported program; what Inductor writes on the way stands beside `path` and goes."""
    import torch._inductor
    from torch._inductor.package.package import package_aoti

    assert program.example_inputs is not None
    folder = path.with_name(f"{path.stem}.inductor")
    options = {
        **OPTIONS,
        "aot_inductor.output_path": str(folder.resolve()),  # not into the compiler's cache, which nobody empties
        "aot_inductor.metadata": {OURS: json.dumps(asdict(built))},
    }
    try:
        with refusals(what, "compiled by AOTInductor"), torch.no_grad():
            module = program.module(check_guards=False)
            files: Any = torch._inductor.aot_compile(module, *program.example_inputs, options=options)
            package_aoti(str(path), files)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def refusals(what: str, done: str) -> Iterator[None]:
    """Torch raises many kinds here, and each means that this model does not go through; of memory it only has words."""
    try:
        yield
    except (OptimizeError, MemoryError, OSError):
        raise
    except Exception as e:
        if any(words in str(e) for words in OUT_OF_MEMORY):
            raise
        raise GateError(
            f"{what} could not be {done}",
            got=f"{type(e).__name__}: {str(e).strip()[:1500]}",
            mend="if a size is named above, make that axis static (--axis NAME=SIZE); else export as ONNX",
        ) from e


# --- running ---------------------------------------------------------------------------------------------------------


class AotiRunner:
    """One package. The file has to be one that its owner trusts: it is native code (see `bundle.check`)."""

    name = "aoti"

    def __init__(self, path: Path, component: Component, *, device: str = "cpu") -> None:
        self.path, self.component, self.device = path, component, device
        self._built: Built | None = None
        self._run: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None

    def __enter__(self) -> Self:
        import torch._inductor

        built = built_of(self.path)
        if built.device != self.device:
            raise InputError(f"{self.path.name} is for {built.device}", got=self.device, expected=built.device)
        check_machine(built, self.path)
        if built.kernels:
            import optimize.kernels.ops  # noqa: F401 - torch has to know our operators before it loads the code
        try:
            self._run = torch._inductor.aoti_load_package(str(self.path)).loader.boxed_run
        except RuntimeError as e:
            raise GateError(
                f"{self.path.name} cannot be loaded", got=" ".join(str(e).split())[:400], mend="export it again"
            ) from e
        self._built = built
        return self

    def __exit__(self, *error: Any) -> None:
        self._run = None

    def infer(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        return self.bind(feeds)()

    def bind(self, feeds: Feeds) -> Bound:
        assert self._run is not None and self._built is not None, "use the runner in a with statement"
        check_names(feeds, [t.name for t in self.component.inputs])
        check_sizes(feeds, self.component, self._built.axes)
        types = {t.name: getattr(torch, t.torch_dtype(self._built.precision)) for t in self.component.inputs}
        given = [feeds[name].to(self.device, kind).contiguous() for name, kind in types.items()]
        call, outputs = self._run, self.component.outputs

        def run() -> dict[str, torch.Tensor]:
            with torch.inference_mode():
                return dict(zip(outputs, call(list(given)), strict=True))  # a new list: the call empties it

        return run


def check_sizes(feeds: Feeds, component: Component, axes: Mapping[str, tuple[int, int, int]]) -> None:
    """Raises InputError for shapes outside the axes that it was compiled for: the code reads memory by the sizes that
    it is given, and checks none of them."""
    known: dict[str, int] = {}
    for spec in component.inputs:
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=False):
            if isinstance(dim, str) and len(dim_terms(dim)) == 1:
                ((name, divisor),) = dim_terms(dim)
                known.setdefault(name, size * divisor)
    for spec in component.inputs:
        shape, told = feeds[spec.name].shape, set(spec.axis_names()) <= set(known)
        if len(shape) != len(spec.shape) or (told and tuple(shape) != spec.sizes(known)):
            raise InputError(
                f"{component.name}: the input {spec.name} does not fit",
                got=list(shape),
                expected=f"[{', '.join(map(str, spec.shape))}]" + "".join(f", {k}={v}" for k, v in known.items()),
            )
    for name, size in known.items():
        least, most, step = axes[name]
        if not least <= size <= most or size % step:
            raise InputError(
                f"{component.name}: the feeds leave the axis {name}",
                got=size,
                expected=f"{least} to {most}" + (f" in steps of {step}" if step != 1 else ""),
                mend=f"export again with --axis {name}=MIN:OPT:MAX",
            )
