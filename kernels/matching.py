"""Rules applied to trees: an expression anywhere, or statements of one block with others between them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence

from .forwards import Env, commute, filled, live, match, writes
from .rules import MODULATED, Rewriting, Rule, norm_of


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
