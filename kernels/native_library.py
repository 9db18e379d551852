"""Where the native operator library lies: ONNX Runtime's kernels for the domain `ai.optimize`, on the CPU and CUDA."""

from __future__ import annotations

import sys
from pathlib import Path

from optimize.errors import MissingError

SUFFIX = {"win32": ".dll", "darwin": ".so"}.get(sys.platform, ".so")
NAME = f"optimize_ort{SUFFIX}"


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
