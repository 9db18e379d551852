"""`optimize.tools.inspect`: the code is in `inspecting.py`.

A script that is started by its path (`python tools/train_demo.py`) has this folder first on its path and finds this
file where it means Python's own `inspect`: it gets that one.
"""

import sys

if __name__ == "inspect":
    import sysconfig
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec("inspect", [sysconfig.get_path("stdlib")])
    assert spec is not None and spec.loader is not None
    sys.modules["inspect"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["inspect"])
else:
    from optimize.tools.inspecting import inspect, run

    __all__ = ["inspect", "run"]
