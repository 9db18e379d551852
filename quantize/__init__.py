"""Fewer bits with a known error. The room bears the front door's verb's name: calling it is `optimize.quantize`."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """Importing a room binds its name in the package, over the verb of the same name; so the room can be called."""

    def __call__(self, *args: Any, **words: Any) -> Any:
        return import_module("optimize.quantizing").quantize(*args, **words)


sys.modules[__name__].__class__ = _Room
