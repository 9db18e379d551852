"""A residual sum, with its gate, and the norm that reads it: one call for both."""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass

from .forwards import Env, live, match, reads, writes
from .matching import Blocks, expression, finished, parsed
from .rules import Rewriting, alike


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
        if not alike(r):
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
