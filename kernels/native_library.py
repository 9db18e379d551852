"""Where the native operator library lies: ONNX Runtime's kernels for the domain `ai.optimize`, on the CPU and CUDA."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from optimize.errors import MissingError

NAME = "optimize_ort.dll" if sys.platform == "win32" else "optimize_ort.so"


def ort_library() -> Path:
    """The library's path, for `SessionOptions.register_custom_ops_library(str(path))` or `RegisterCustomOpsLibrary_V2`.

    An editable install has the package's sources in one folder and what was built in another: both are looked in.
    Raises MissingError where the package was installed without building it."""
    import optimize.kernels

    places = [Path(folder) / NAME for folder in optimize.kernels.__path__]
    for place in places:
        if place.is_file():
            return place
    raise MissingError(
        "the native operator library was not built",
        got=f"no {NAME} in {', '.join(str(place.parent) for place in places)}",
        expected="the package's own build to have made it, with CMake and a C++17 compiler",
        mend="install a C++ compiler (g++ or clang++) and run `pip install --force-reinstall --no-deps .` again",
    )


def cubins(library: Path) -> int:
    """How many compiled Triton kernels the library carries. With none it must stay out of a CUDA session: ONNX Runtime
    would give it the nodes, and they could not run."""
    count: int = ctypes.CDLL(str(library)).optimize_kernels_cubins()
    return count
