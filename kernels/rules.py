"""The rules of `fuse`, in one table, and what is known while one forward is rewritten.

A rule replaces one expression, or statements of one block, by calls of `served.py` (`_fused` in the rewritten text).
Between its statements others may stand that can change places with them. Words in capitals are holes (see
`forwards.py`); those of HOLES take only what they name. `KIND` and `ACTIVATION` are filled by what was recognised.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from .forwards import UNKNOWN, DeclinedError, Env, Scope, writes
from .recognise import activation_kind, norm_kind, rotation_kind, untouched


@dataclass(frozen=True)
class Site:
    """One place in a module: `path` of the norm, attention or gate; `into` what it became, or `why` it did not."""

    path: str
    kind: str
    into: str = ""
    why: str = ""


@dataclass
class Rewriting:
    """One function on its way: its scope, the paths of the modules that may be touched, what was found so far."""

    scope: Scope
    paths: Mapping[int, str]
    path: str
    impl: str
    sites: dict[tuple[str, str], Site] = field(default_factory=dict)
    known: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def found(self, path: str, kind: str, into: str = "", why: str = "") -> None:
        self.sites[path, kind] = Site(path, kind, into, why)

    def path_of(self, node: ast.expr) -> str:
        return self.paths.get(id(self.scope.resolve(node)), self.path)

    def once(self, question: Callable[[object], str | None], node: ast.expr) -> str | None:
        """The answer about what this expression stands for, asked once for each text."""
        if not isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
            return None
        key = (question.__name__, ast.unparse(node))
        if key not in self.known:
            thing = self.scope.resolve(node)
            closed = thing is UNKNOWN or (isinstance(thing, nn.Module) and id(thing) not in self.paths)
            try:
                self.known[key] = None if closed else question(thing)
            except DeclinedError:
                self.known[key] = None
        return self.known[key]

    def fits(self, hole: str, node: ast.expr, env: Env) -> bool:
        """Whether this hole may take this expression."""
        rule = HOLES.get(hole.rstrip("0123456789"))
        return rule is None or rule(self, node, env)


# --- what holes take -------------------------------------------------------------------------------------------------


def free_norm(thing: object) -> str | None:
    """The kind of a norm whose own call may be gone round."""
    kind = norm_kind(thing)
    if kind is not None and isinstance(thing, nn.Module):
        untouched(thing)
    return kind


def norm_of(r: Rewriting, node: ast.expr) -> str | None:
    return r.once(free_norm, node)


def takes_norm(r: Rewriting, node: ast.expr, env: Env) -> bool:
    kind = norm_of(r, node)
    if kind is None or kind == "group_norm":
        return False
    env["KIND"] = ast.Constant(kind)
    return True


def takes_rms(r: Rewriting, node: ast.expr, env: Env) -> bool:
    kind = norm_of(r, node)
    return (kind or "").startswith("rms_norm") and r.scope.resolve(node).weight is not None


def takes_activation(r: Rewriting, node: ast.expr, env: Env) -> bool:
    kind = r.once(activation_kind, node)
    if kind is not None:
        env["ACTIVATION"] = ast.Constant(kind)
    return kind is not None


HOLES: Mapping[str, Callable[[Rewriting, ast.expr, Env], bool]] = {
    "NORM": takes_norm,
    "RMS": takes_rms,
    "GROUP": lambda r, node, env: norm_of(r, node) == "group_norm",
    "ACT": takes_activation,
    "SILU": lambda r, node, env: r.once(activation_kind, node) == "silu",
    "ROPE": lambda r, node, env: r.once(rotation_kind, node) == "interleaved",
    "HALF": lambda r, node, env: r.once(rotation_kind, node) == "halves",
    "GATE": lambda r, node, env: "gate" in ast.unparse(node),
    "VALUE": lambda r, node, env: not isinstance(node, ast.Constant),
}

# --- rules -----------------------------------------------------------------------------------------------------------

Check = Callable[[Rewriting, Env, ast.FunctionDef], bool]


@dataclass(frozen=True)
class Rule:
    """`before` becomes `after`. `sites` are (hole of the norm or "" for the module itself, kind); `dead` are holes
    whose value nobody may read afterwards. Without `after` it declines: `into` says why."""

    before: str
    after: str
    into: str
    sites: tuple[tuple[str, str], ...]
    dead: tuple[str, ...] = ()
    check: Check = lambda *_: True


def same_source(r: Rewriting, env: Env, tree: ast.FunctionDef) -> bool:
    """q and k come from the same tokens: their first values are the same call, or calls of the same arguments. Their
    norms have the same eps."""
    one, other = (r.scope.resolve(env[n]) for n in ("RMS1", "RMS2"))
    if getattr(one, "eps", None) != getattr(other, "eps", None):
        return False
    firsts = []
    for hole in ("Q", "K"):
        name = ast.unparse(env[hole])
        first = next((s for s in ast.walk(tree) if isinstance(s, ast.Assign) and name in writes(s)), None)
        if first is None or not isinstance(first.value, ast.Call):
            return False
        firsts.append(first.value)
    return firsts[0] is firsts[1] or [ast.dump(a) for a in firsts[0].args] == [ast.dump(a) for a in firsts[1].args]


def heads_first(r: Rewriting, env: Env, tree: ast.FunctionDef) -> bool:
    """As above, and q lies as [batch, heads, tokens, head_dim], which the result's memory takes for granted."""
    name = ast.unparse(env["Q"])
    values = [ast.unparse(s.value) for s in ast.walk(tree) if isinstance(s, ast.Assign) and name in writes(s)]
    return any(value.endswith(".transpose(1, 2)") for value in values) and same_source(r, env, tree)


def alike(r: Rewriting, *_: object) -> bool:
    """Not where embeddings are summed: positions may broadcast over the batch, and a residual has x's shape."""
    module = r.scope.roots.get("self")
    return not (isinstance(module, nn.Module) and any(isinstance(c, nn.Embedding) for c in module.children()))


QK_SITES = (("RMS1", "rms_norm"), ("RMS2", "rms_norm"), ("", "qk_norm_rope"))
MODULATED = (("NORM", "norm"), ("NORM", "modulation"))
RULES: tuple[Rule, ...] = (
    # AdaLN of FLUX, SD3.5, DiT and PixArt
    Rule("NORM(X) * (1 + S) + T", "_fused.norm(KIND, NORM, X, S, T)", "norm", MODULATED),
    Rule("NORM(X) * (1 + S)[:, None, :] + T", "_fused.norm(KIND, NORM, X, S[:, None, :], T)", "norm", MODULATED),
    Rule("NORM(X) * (1 + S)", "_fused.norm(KIND, NORM, X, S)", "norm", MODULATED),
    # SD3.5 modulates one norm twice: it is computed twice, which still moves less memory
    Rule(
        "N = NORM(X)\nA = N * (1 + S) + T\nB = N * (1 + S2) + T2",
        "A, B = (_fused.norm(KIND, NORM, X, S, T), _fused.norm(KIND, NORM, X, S2, T2))",
        "norm",
        MODULATED,
        dead=("N",),
    ),
    Rule(
        "N = NORM(X)\nA = N * (1 + S) + T",
        "A = _fused.norm(KIND, NORM, X, S, T)",
        "norm",
        MODULATED,
        dead=("N",),
    ),
    Rule(
        "NORM(A + B)",
        "_fused.add_norm(KIND, NORM, A, B)[0]",
        "add_norm",
        (("NORM", "norm"), ("NORM", "residual+norm")),
        check=alike,
    ),
    # ResnetBlock2D, the end of a U-Net and of a VAE
    Rule("SILU(GROUP(X))", "_fused.group_norm(GROUP, X, 'silu')", "group_norm+silu", (("GROUP", "group_norm"),)),
    Rule(
        "N = GROUP(X)\nA = SILU(N)",
        "A = _fused.group_norm(GROUP, X, 'silu')",
        "group_norm+silu",
        (("GROUP", "group_norm"),),
        dead=("N",),
    ),
    # GEGLU, SwiGLU, llama, T5
    Rule("ACT(G) * VALUE", "_fused.gated(ACTIVATION, VALUE, G)", "gated", (("", "gated"),)),
    Rule("VALUE * ACT(G)", "_fused.gated(ACTIVATION, VALUE, G)", "gated", (("", "gated"),)),
    Rule("A = ACT(G)\nY = A * VALUE", "Y = _fused.gated(ACTIVATION, VALUE, G)", "gated", (("", "gated"),), dead=("A",)),
    Rule("A = ACT(G)\nY = VALUE * A", "Y = _fused.gated(ACTIVATION, VALUE, G)", "gated", (("", "gated"),), dead=("A",)),
    # FLUX: text and image are normed apart and rotated together
    Rule(
        "Q = RMS1(Q)\nK = RMS2(K)\nEQ = RMS3(EQ)\nEK = RMS4(EK)\n"
        "Q = torch.cat([EQ, Q], dim=1)\nK = torch.cat([EK, K], dim=1)\n"
        "if R is not None:\n    Q = ROPE(Q, R, sequence_dim=1)\n    K = ROPE(K, R, sequence_dim=1)",
        "Q, K = _fused.joint_qk_norm_rope((RMS3, RMS4), (EQ, EK), (RMS1, RMS2), (Q, K), R)",
        "qk_norm_rope",
        (*QK_SITES, ("RMS3", "rms_norm"), ("RMS4", "rms_norm")),
        dead=("EQ", "EK"),
        check=same_source,
    ),
    Rule(
        "Q = RMS1(Q)\nK = RMS2(K)\n"
        "if R is not None:\n    Q = ROPE(Q, R, sequence_dim=1)\n    K = ROPE(K, R, sequence_dim=1)",
        "Q, K = _fused.qk_norm_rope(RMS1, RMS2, Q, K, R)",
        "qk_norm_rope",
        QK_SITES,
        check=same_source,
    ),
    # SD3.5 has the norms without a rotation, llama the rotation without norms
    Rule(
        "Q = RMS1(Q)\nK = RMS2(K)",
        "Q, K = _fused.qk_norm(RMS1, RMS2, Q, K)",
        "qk_norm_rope",
        QK_SITES,
        check=heads_first,
    ),
    Rule("HALF(Q, K, C, S)", "_fused.half_rotation(Q, K, C, S)", "qk_norm_rope", (("", "qk_norm_rope"),)),
)
LEFT: tuple[Rule, ...] = (
    Rule(
        "N = GROUP(X)\nA = N * (1 + S) + T",
        "",
        "it follows a group norm: needs a layer or RMS norm",
        (("GROUP", "modulation"),),
    ),
    Rule(
        "ROPE(Q, R, sequence_dim=1)",
        "",
        "rotated apart from its norm: needs q and k one after the other",
        (("", "qk_norm_rope"),),
    ),
)
"""What no rule took, and why."""
