"""The rewriting rules of `fuse`: one table of patterns, and what of a forward is left over and why.

A rule replaces one expression, or statements of one block, by calls of `served.py` (`_fused` in the rewritten text).
Between its statements others may stand that can change places with them. Words in capitals are holes (see
`forwards.py`); those of HOLES take only what they name. `KIND` and `ACTIVATION` are filled by what was recognised.
"""

from __future__ import annotations

import ast
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .forwards import UNKNOWN, DeclinedError, Env, Scope, commute, filled, live, match, read, reads, writes
from .recognise import NORMS, activation_kind, attention_call, norm_kind, rotation_kind


@dataclass(frozen=True)
class Site:
    """One place in a module: `path` of the norm, attention or gate; `into` what it became, or `why` it did not."""

    path: str
    kind: str
    into: str = ""
    why: str = ""


@dataclass
class Rewriting:
    """One function on its way: its scope, the paths of all modules, what was found so far."""

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
            try:
                self.known[key] = None if thing is UNKNOWN else question(thing)
            except DeclinedError:
                self.known[key] = None
        return self.known[key]

    def fits(self, hole: str, node: ast.expr, env: Env) -> bool:
        """Whether this hole may take this expression."""
        rule = HOLES.get(hole.rstrip("0123456789"))
        return rule is None or rule(self, node, env)


# --- what holes take -------------------------------------------------------------------------------------------------


def norm_of(r: Rewriting, node: ast.expr) -> str | None:
    return r.once(norm_kind, node)


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
        "NORM(A + B)", "_fused.add_norm(KIND, NORM, A, B)[0]", "add_norm", (("NORM", "norm"), ("NORM", "residual+norm"))
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
        check=same_source,
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


@functools.cache
def parsed(text: str) -> tuple[ast.stmt, ...]:
    return tuple(ast.parse(text).body)


def expression(text: str) -> ast.expr | None:
    """The pattern's expression; None where it is made of statements."""
    body = parsed(text)
    return body[0].value if len(body) == 1 and isinstance(body[0], ast.Expr) else None


def finished(r: Rewriting, template: str, env: Env) -> list[ast.stmt]:
    """The rule's result: holes filled, and each call of ours told which implementation is wanted."""
    body: list[ast.stmt] = filled(ast.Module(list(parsed(template)), []), env).body
    for node in (n for s in body for n in ast.walk(s)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("_fused.") and not named(node, "impl"):
            node.keywords.append(ast.keyword("impl", ast.Constant(r.impl)))
    return body


def named(node: ast.Call, name: str) -> bool:
    return any(k.arg == name for k in node.keywords)


def note(r: Rewriting, rule: Rule, env: Env) -> None:
    for hole, kind in rule.sites:
        path = r.path_of(env[hole]) if hole else r.path
        norm = norm_of(r, env[hole]) if hole.startswith(("NORM", "RMS")) else None
        plain = (norm or "").removesuffix("_as_weight")
        if not rule.after:
            r.found(path, kind, why=rule.into)
            continue
        into = rule.into.replace("norm", plain) if rule.into in ("norm", "add_norm") else rule.into
        gate = ast.unparse(env.get("ACTIVATION", ast.Constant(None)))
        named_kind = {"norm": plain, "gated": "swiglu" if gate == "'silu'" else "geglu"}.get(kind, kind)
        r.found(path, named_kind, into + ("+modulation" if rule.sites is MODULATED else ""))


# --- applying them ---------------------------------------------------------------------------------------------------


class Expressions(ast.NodeTransformer):
    """Applies one rule on an expression everywhere."""

    def __init__(self, r: Rewriting, rule: Rule, tree: ast.FunctionDef) -> None:
        self.r, self.rule, self.tree, self.pattern = r, rule, tree, expression(rule.before)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        env: Env = {}
        if isinstance(node, ast.expr) and match(self.pattern, node, env, self.r.fits) and self.allowed(env):
            note(self.r, self.rule, env)
            if self.rule.after:
                (made,) = finished(self.r, self.rule.after, env)
                assert isinstance(made, ast.Expr)
                return made.value
        return super().generic_visit(node)

    def allowed(self, env: Env) -> bool:
        return self.rule.check(self.r, env, self.tree)


Blocks = Sequence[Sequence[ast.stmt]]


def blocks(body: list[ast.stmt], after: Blocks = ()) -> Iterator[tuple[list[ast.stmt], Blocks]]:
    """Every block, with what follows it, from the inside out. What is in a loop is followed by the loop itself."""
    yield body, after
    for i, statement in enumerate(list(body)):
        rest: Blocks = (body[i + 1 :], *after)
        if isinstance(statement, ast.For | ast.While):
            rest = (statement.body, *rest)
        for name in ("body", "orelse", "finalbody"):
            inner = getattr(statement, name, None)
            if name == "orelse" and getattr(statement, "original", False):
                continue
            if isinstance(inner, list) and inner and isinstance(inner[0], ast.stmt):
                yield from blocks(inner, rest)


def sequence(
    r: Rewriting, patterns: Sequence[ast.stmt], body: Sequence[ast.stmt], at: int
) -> tuple[Env, list[int]] | None:
    """The statements from `at` on that are written as the patterns, in order; others between them have to commute."""
    env: Env = {}
    taken: list[int] = []
    for i in range(at, len(body)):
        trial = dict(env)
        if match(patterns[len(taken)], body[i], trial, r.fits):
            env = trial
            taken.append(i)
            if len(taken) == len(patterns):
                return env, taken
        elif not taken or not all(commute(body[t], body[i]) for t in taken):
            return None
    return None


def apply_statements(r: Rewriting, rule: Rule, body: list[ast.stmt], after: Blocks, tree: ast.FunctionDef) -> bool:
    patterns = parsed(rule.before)
    for at in range(len(body)):
        found = sequence(r, patterns, body, at)
        if found is None:
            continue
        env, taken = found
        rest = (body[taken[-1] + 1 :], *after)
        made = finished(r, rule.after, env)
        kept = set().union(*map(writes, made)) if made else set()
        if any(ast.unparse(env[n]) not in kept and live(ast.unparse(env[n]), rest) for n in rule.dead):
            continue
        if not rule.check(r, env, tree):
            continue
        note(r, rule, env)
        if not rule.after:
            return False
        body[taken[-1]] = made[0]
        for i in reversed(taken[:-1]):
            del body[i]
        return True
    return False


# --- rules that are no pattern ---------------------------------------------------------------------------------------


def attentions(r: Rewriting, tree: ast.FunctionDef) -> None:
    """Calls of torch's and diffusers' attention functions, and transformers' choice of one, become ours."""
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = r.once(attention_call, node.func)
        chooses = isinstance(node.func, ast.Attribute) and node.func.attr == "get_interface" and node.args
        if name is None and not chooses:
            continue
        why = why_not_attention(r, node, bool(chooses))
        if why:
            r.found(r.path, "attention", why=why)
            continue
        node.func = ast.parse(f"_fused.{name or 'interface'}", mode="eval").body
        if chooses:
            node.args, node.keywords = [], []
        node.keywords.append(ast.keyword("impl", ast.Constant(r.impl)))
        r.found(r.path, "attention", "attention")


def why_not_attention(r: Rewriting, node: ast.Call, chooses: bool) -> str:
    if chooses:
        wanted = r.scope.resolve(node.args[0])
        return "" if wanted == "sdpa" else f'its attn_implementation is {wanted!r}: needs "sdpa"'
    given = {k.arg: k.value for k in node.keywords}
    dropout = given.get("dropout_p", ast.Constant(0.0))
    if isinstance(dropout, ast.Constant) and dropout.value:
        return f"it has a dropout of {dropout.value!r}: needs none"
    for name in ("backend", "parallel_config"):
        wanted = r.scope.resolve(given[name]) if name in given else None
        if wanted is not None and wanted is not UNKNOWN:
            return f"its attention asks for the {name} {getattr(wanted, 'value', wanted)}: needs none"
    return ""


def sink_activation(r: Rewriting, body: list[ast.stmt]) -> None:
    """`if C: X = norm(X) else: X = other(X)` and `X = silu(X)` after it: the latter moves into both branches."""
    for i, (choice, then) in enumerate(itertools.pairwise(body)):
        if not isinstance(choice, ast.If) or not choice.orelse:
            continue
        ends = [branch[-1] for branch in (choice.body, choice.orelse)]
        if not all(isinstance(e, ast.Assign) for e in ends):
            continue
        if any(sequence(r, parsed("N = GROUP(X)\nA = SILU(N)"), [end, then], 0) for end in ends):
            choice.body.append(copy.deepcopy(then))
            choice.orelse.append(copy.deepcopy(then))
            del body[i + 1]
            return


def normed(r: Rewriting, statement: ast.stmt) -> tuple[str, Env] | None:
    """`N = NORM(H)`, modulated or not: the holes, H a plain name."""
    for text in (
        "N = NORM(H)",
        "N = _fused.norm(KIND, NORM, H, S, T, impl=I)",
        "N = _fused.norm(KIND, NORM, H, S, impl=I)",
    ):
        env: Env = {}
        if match(parsed(text)[0], statement, env, r.fits) and isinstance(env["H"], ast.Name):
            return env["H"].id, env
    return None


def guard_test(statement: ast.stmt, total: str, residual: ast.expr) -> ast.expr | None:
    """The test of an `if` that may stand between a sum and its norm, as it reads before the sum; None for others."""
    if not isinstance(statement, ast.If) or statement.orelse:
        return None
    if any(isinstance(n, ast.Call | ast.NamedExpr) for n in ast.walk(statement.test)):
        return None
    ranks = sum(isinstance(n, ast.Attribute) and ast.unparse(n) == f"{total}.ndim" for n in ast.walk(statement.test))
    if sum(isinstance(n, ast.Name) and n.id == total for n in ast.walk(statement.test)) != ranks:
        return None  # more than its rank is asked for, and that is all that the sum shares with its summand

    class Rename(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return residual if node.id == total else node

    renamed: ast.expr = Rename().visit(copy.deepcopy(statement.test))
    return renamed


def gate_of(r: Rewriting, x: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """The gate and what it opens, of `gate * x`."""
    for text in ("GATE * X", "X * GATE"):
        env: Env = {}
        pattern = expression(text)
        if match(pattern, x, env, r.fits):
            return env["GATE"], env["X"]
    return None


def summands(total: str, add: ast.stmt) -> tuple[ast.expr, ast.expr] | None:
    """(residual, branch) of `total = residual + branch`, either way round; the residual is what goes on in its name."""
    env: Env = {}
    if not match(parsed("H = A + B")[0], add, env, lambda *_: True) or ast.unparse(env["H"]) != total:
        return None
    a, b = env["A"], env["B"]
    turned = ast.unparse(b) == total or "residual" in ast.unparse(b)
    return (b, a) if turned else (a, b)


def add_before_norm(r: Rewriting, body: list[ast.stmt], after: Blocks) -> bool:
    """A sum, with its gate, that the next norm reads: both become one call. `if`s between them (a rank of 4, GLIGEN,
    cross attention) stay what they are: the call is made where none of them is taken."""
    for i, statement in enumerate(body):
        found = normed(r, statement)
        if found is None:
            continue
        total, env = found
        start = i - 1
        copy_to = None
        if start >= 0 and match(parsed("R = H")[0], body[start], trial := {"H": env["H"]}, lambda *_: True):
            copy_to, start = trial["R"], start - 1
        guards: list[ast.If] = []
        while start >= 0 and isinstance(body[start], ast.If):
            guards.insert(0, body[start])  # type: ignore[arg-type]
            start -= 1
        pair = summands(total, body[start]) if start >= 0 else None
        if pair is None:
            continue
        path = r.path_of(env["NORM"])
        if any(isinstance(c, nn.Embedding) for c in getattr(r.scope.roots.get("self"), "children", list)()):
            r.found(path, "residual+norm", why="embeddings are summed, of sizes that may differ: needs two alike")
            continue
        if replace_sum(r, body, after, Sum(start, i, pair, guards, copy_to, total, env)):
            return True
    return False


@dataclass(frozen=True)
class Sum:
    """A sum at `start` and its norm at `end` of a block; `env` holds NORM, KIND, N, and S and T where modulated."""

    start: int
    end: int
    pair: tuple[ast.expr, ast.expr]
    guards: list[ast.If]
    copy_to: ast.expr | None
    total: str
    env: Env


def replace_sum(r: Rewriting, body: list[ast.stmt], after: Blocks, s: Sum) -> bool:
    residual, x = s.pair
    tests = [guard_test(g, s.total, residual) for g in s.guards]
    path = r.path_of(s.env["NORM"])
    if None in tests:
        r.found(path, "residual+norm", why="what stands between the sum and the norm changes the sum")
        return False
    start, gate = s.start, gate_of(r, x)
    rest = (body[s.end + 1 :], *after)
    before = body[start - 1] if start else None
    if gate is None and isinstance(x, ast.Name) and isinstance(before, ast.Assign) and writes(before) == {x.id}:
        read_between = any(x.id in reads(g) for g in s.guards)
        gate = None if read_between or live(x.id, rest) else gate_of(r, before.value)
        start -= gate is not None
    none = ast.Constant(None)
    normed_name = ast.unparse(s.env["N"])
    holes = {**s.env, "A": residual, "B": gate[1] if gate else x, "G": gate[0] if gate else none}
    holes = {"S": none, "T": none, **holes, "R": s.copy_to or s.env["H"]}
    call = "_fused.add_norm(KIND, NORM, A, B, G, S, T)"
    if normed_name == s.total and s.copy_to is None:
        text = f"N = {call}[0]"
    elif normed_name == s.total:
        text = f"N, R = {call}"
    else:
        text = f"N, H = {call}" + ("\nR = H" if s.copy_to is not None else "")
    made = finished(r, text, holes)
    if tests:
        original = body[start : s.end + 1]
        test = " or ".join(f"({ast.unparse(t)})" for t in tests if t is not None)
        choice = ast.If(expression(f"not ({test})") or none, made, original)
        choice.original = True  # type: ignore[attr-defined]  # its else branch is left as it is
        made = [choice]
    body[start : s.end + 1] = made
    plain = ast.literal_eval(s.env["KIND"]).removesuffix("_as_weight")
    words = ["add_" + plain, *(["gate"] if gate else []), *(["modulation"] if "S" in s.env else [])]
    for kind in (plain, "residual+norm", *(["modulation"] if "S" in s.env else [])):
        r.found(path, kind, "+".join(words))
    return True


# --- all of it -------------------------------------------------------------------------------------------------------


def rewrite(r: Rewriting, tree: ast.FunctionDef) -> ast.FunctionDef:
    """The settled function with every rule applied that fits. Raises nothing: what does not fit stays."""
    tree = copy.deepcopy(tree)
    attentions(r, tree)
    for body, _ in list(blocks(tree.body)):
        sink_activation(r, body)
    for rule in RULES:
        if expression(rule.before) is not None:
            tree.body = [Expressions(r, rule, tree).visit(s) for s in tree.body]
            continue
        while any(apply_statements(r, rule, body, after, tree) for body, after in blocks(tree.body)):
            pass
    while any(add_before_norm(r, body, after) for body, after in blocks(tree.body)):
        pass
    for rule in LEFT:
        for body, after in blocks(tree.body):
            apply_statements(r, rule, body, after, tree)
        if expression(rule.before) is not None:
            tree.body = [Expressions(r, rule, tree).visit(s) for s in tree.body]
    return ast.fix_missing_locations(tree)


def declined(sites: Sequence[Site], why: str) -> list[Site]:
    """The same sites for a function that has to stay; its norms are modules, and served as such."""
    return [Site(site.path, site.kind, why=why) for site in sites if site.kind not in NORMS]


def rewritten(
    function: object, roots: Mapping[str, object], paths: Mapping[int, str], path: str, impl: str
) -> tuple[str | None, list[Site]]:
    """The function's new text, None where no rule took anything, and what was found in it. The text is for modules
    that settle the same branches. Raises DeclinedError for a function that cannot be read."""
    tree = read(function, bare=False)
    scope = Scope.of(function, tree, roots)
    settled = scope.settle(tree)
    r = Rewriting(scope, paths, path, impl)
    made = rewrite(r, settled)
    sites = list(r.sites.values())
    if not any(site.into for site in sites):
        return None, sites
    try:
        read(function)  # bare, now that there is something to put in its place
    except DeclinedError as e:
        return None, declined(sites, str(e))
    return ast.unparse(made), sites
