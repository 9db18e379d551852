"""The same maths, faster: attention and fused norms in Triton, as torch operators, ONNX functions and a native library.

Nothing here needs the other rooms. torch and triton are imported when an operation is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fusing import Report as Report
    from .fusing import fuse as fuse
    from .fusing import unfuse as unfuse
    from .native_library import ort_library as ort_library
    from .ops import attention as attention
    from .ops import geglu as geglu
    from .ops import group_norm as group_norm
    from .ops import layer_norm as layer_norm
    from .ops import qk_norm_rope as qk_norm_rope
    from .ops import rms_norm as rms_norm
    from .ops import swiglu as swiglu

WHERE = {
    "Report": "fusing",
    "attention": "ops",
    "fuse": "fusing",
    "geglu": "ops",
    "group_norm": "ops",
    "layer_norm": "ops",
    "ort_library": "native_library",
    "qk_norm_rope": "ops",
    "rms_norm": "ops",
    "swiglu": "ops",
    "unfuse": "fusing",
}
__all__ = [
    "Report",
    "attention",
    "fuse",
    "geglu",
    "group_norm",
    "layer_norm",
    "ort_library",
    "qk_norm_rope",
    "rms_norm",
    "swiglu",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{WHERE[name]}"), name)
