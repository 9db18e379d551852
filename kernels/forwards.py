"""Forwards as syntax trees: read, settled for one module, matched against patterns, compiled back.

A pattern is Python text in which words in capitals are holes: `NORM(X) * (1 + S) + T`. The same hole takes the same
text each time. What a hole may take is decided by `fits`, which the caller gives.
"""

from __future__ import annotations

import ast
import builtins
import copy
import functools
import inspect
import linecache
import re
import textwrap
import types
import zlib
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HOLE = re.compile(r"[A-Z][A-Z0-9]*")
UNKNOWN: Any = object()
CHANGING = ("training", "gradient_checkpointing")
"""Attributes that are switched in a module's life: no branch is settled by them."""
PLAIN = (bool, int, float, str, types.NoneType)
FOR_TRAINING = ("forward_with_checkpointing",)
"""Wrappers that do nothing in inference: transformers' gradient checkpointing of each layer."""
Env = dict[str, ast.expr]
Fits = Callable[[str, ast.expr, Env], bool]


class DeclinedError(Exception):
    """Why something is left as it is; it becomes the reason in the report and reaches nobody as an error."""


# --- reading ---------------------------------------------------------------------------------------------------------


def unwrapped(function: Any) -> Any:
    """The function inside of what only serves training."""
    while getattr(getattr(function, "__code__", None), "co_name", "") in FOR_TRAINING:
        function = function.__wrapped__
    return function


@functools.cache
def read(function: Any, *, bare: bool = True) -> ast.FunctionDef:
    """The function's own tree, without docstring and annotations; not to be changed. `bare`: a decorated one is
    declined."""
    function = unwrapped(function)
    if not inspect.isfunction(function):
        raise DeclinedError("it is no plain Python function")
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError) as e:
        raise DeclinedError("its source is not to be had") from e
    if not isinstance(found, ast.FunctionDef):
        raise DeclinedError("it is no plain Python function")
    if bare and (found.decorator_list or hasattr(function, "__wrapped__")):
        names = ", ".join(f"@{ast.unparse(d)}" for d in found.decorator_list)
        raise DeclinedError(f"its forward is decorated ({names or 'wrapped'})")
    if any(n.startswith("__") and not n.endswith("__") for n in names_in(found)):
        raise DeclinedError("it uses names that are private to its class")
    found.decorator_list, found.returns = [], None
    for argument in ast.walk(found.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if ast.get_docstring(found) is not None:
        found.body = found.body[1:] or [ast.Pass()]
    return found


def names_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def canonical(function: Any, owner: object) -> str:
    """The body's text, settled for `owner`, its argument called x and any name of epsilon eps: to compare by."""
    tree = read(function, bare=False)
    settled = Scope.of(function, tree, {tree.args.args[0].arg: owner}).settle(tree)
    argument = settled.args.args[-1].arg

    class Rename(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.Name:
            return ast.Name("x", node.ctx) if node.id == argument else node

    text = "\n".join(ast.unparse(Rename().visit(s)) for s in settled.body)
    return re.sub(r"\bself\.(variance_epsilon|epsilon)\b", "self.eps", text)


# --- what is known of names ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scope:
    """What the names of one function stand for: `roots` ("self" and, in a processor, its attention) and globals."""

    roots: Mapping[str, object]
    names: Mapping[str, Any]
    assigned: frozenset[str]

    @classmethod
    def of(cls, function: Any, tree: ast.FunctionDef, roots: Mapping[str, object]) -> Scope:
        function = unwrapped(function)
        own = {a.arg for a in ast.walk(tree.args) if isinstance(a, ast.arg)}
        free = inspect.getclosurevars(function).nonlocals if function.__closure__ else {}
        return cls(
            roots,
            ChainMap(dict(free), function.__globals__, vars(builtins)),
            frozenset(writes(tree) | own - set(roots)),
        )

    def resolve(self, node: ast.expr) -> Any:
        """The object that `self.norm1`, `attn.to_out[0]` or `F.silu` stands for; UNKNOWN for anything else."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id not in self.assigned:
            return self.roots.get(node.id, self.names.get(node.id, UNKNOWN))
        owner = self.resolve(node.value) if isinstance(node, ast.Attribute | ast.Subscript) else UNKNOWN
        if owner is UNKNOWN:
            return UNKNOWN
        try:
            if isinstance(node, ast.Attribute):
                return getattr(owner, node.attr)
            return owner[node.slice.value] if isinstance(node.slice, ast.Constant) else UNKNOWN  # type: ignore[attr-defined]
        except Exception:  # a property may want what is not there yet, an index may be none
            return UNKNOWN

    def fact(self, node: ast.expr) -> Any:
        """The value of an expression that is settled for this module, UNKNOWN where it is not."""
        known = FACTS.get(type(node))
        return UNKNOWN if known is None else known(self, node)

    def negated(self, node: ast.UnaryOp) -> Any:
        inner = self.fact(node.operand)
        return UNKNOWN if inner is UNKNOWN or not isinstance(node.op, ast.Not) else not inner

    def listed(self, node: ast.List | ast.Tuple) -> Any:
        values = [self.fact(e) for e in node.elts]
        return UNKNOWN if any(v is UNKNOWN for v in values) else values

    def asked(self, node: ast.Call) -> Any:
        """Questions such as `is_torch_npu_available()`: what this machine has, it keeps."""
        if node.args or not re.fullmatch(r"is_\w+_available", ast.unparse(node.func)):
            return UNKNOWN
        called = self.resolve(node.func)
        return UNKNOWN if called is UNKNOWN else bool(called())

    def attribute(self, node: ast.Attribute) -> Any:
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            if root.attr.startswith("_") or root.attr in CHANGING:
                return UNKNOWN
            root = root.value
        return self.resolve(node) if isinstance(root, ast.Name) and root.id in self.roots else UNKNOWN

    def either(self, node: ast.BoolOp) -> Any:
        values = [self.fact(v) for v in node.values]
        values = [v if isinstance(v, PLAIN) else UNKNOWN for v in values]
        deciding = isinstance(node.op, ast.Or)
        if any(v is not UNKNOWN and bool(v) is deciding for v in values):
            return deciding
        return UNKNOWN if any(v is UNKNOWN for v in values) else not deciding

    def compared(self, node: ast.Compare) -> Any:
        left, right, op = self.fact(node.left), self.fact(node.comparators[0]), node.ops[0]
        if left is UNKNOWN or right is UNKNOWN:
            return UNKNOWN
        if isinstance(op, ast.Is | ast.IsNot) and right is None:
            return (left is None) is isinstance(op, ast.Is)
        if not isinstance(left, PLAIN) or not isinstance(right, (*PLAIN, list)):
            return UNKNOWN
        if isinstance(op, ast.Eq | ast.NotEq):
            return (left == right) is isinstance(op, ast.Eq)
        if isinstance(op, ast.In | ast.NotIn) and isinstance(right, list):
            return (left in right) is isinstance(op, ast.In)
        return UNKNOWN

    def settle(self, tree: ast.FunctionDef) -> ast.FunctionDef:
        """The function with each `if` that this module decides replaced by the branch that it takes."""
        scope = self

        class Settle(ast.NodeTransformer):
            def visit_If(self, node: ast.If) -> Any:
                truth = scope.fact(node.test)
                if truth is UNKNOWN or not isinstance(truth, PLAIN):
                    self.generic_visit(node)
                    node.body = node.body or [ast.Pass()]
                    return node
                kept = ast.Module(node.body if truth else node.orelse, [])
                self.generic_visit(kept)
                return kept.body

        settled: ast.FunctionDef = Settle().visit(copy.deepcopy(tree))
        settled.body = settled.body or [ast.Pass()]
        return settled


FACTS: Mapping[type, Callable[[Scope, Any], Any]] = {
    ast.BoolOp: Scope.either,
    ast.UnaryOp: Scope.negated,
    ast.Compare: Scope.compared,
    ast.List: Scope.listed,
    ast.Tuple: Scope.listed,
    ast.Call: Scope.asked,
    ast.Constant: lambda scope, node: node.value,
    ast.Attribute: Scope.attribute,
}

# --- what statements read and write ----------------------------------------------------------------------------------


def writes(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            found.add(node.id)
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
    return found


def reads(tree: ast.AST) -> set[str]:
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.AugAssign):
            found |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
    return found


def commute(early: ast.stmt, late: ast.stmt) -> bool:
    """Whether the two may change places."""
    return not (writes(early) & (reads(late) | writes(late)) or reads(early) & writes(late))


def live(name: str, after: Sequence[Sequence[ast.stmt]]) -> bool:
    """Whether a value of this name may still be read in what follows (blocks from the inside out)."""
    for statement in (s for block in after for s in block):
        if name in reads(statement):
            return True
        if isinstance(statement, ast.Assign) and name in writes(statement):
            return False
        if isinstance(statement, ast.Return):
            return False
    return False


# --- patterns --------------------------------------------------------------------------------------------------------


def match(pattern: Any, node: Any, env: Env, fits: Fits) -> bool:
    """Whether the node is written as the pattern; `env` takes what the holes took."""
    if isinstance(pattern, ast.Name) and HOLE.fullmatch(pattern.id):
        return taken(pattern, node, env, fits)
    if isinstance(pattern, list):
        same = isinstance(node, list) and len(pattern) == len(node)
        return same and all(match(p, n, env, fits) for p, n in zip(pattern, node, strict=True))
    if not isinstance(pattern, ast.AST):
        return bool(pattern == node)
    fields = [f for f in pattern._fields if f not in ("ctx", "type_comment", "kind")]
    return type(pattern) is type(node) and all(match(getattr(pattern, f), getattr(node, f), env, fits) for f in fields)


def taken(hole: ast.Name, node: Any, env: Env, fits: Fits) -> bool:
    if not isinstance(node, ast.expr) or (isinstance(hole.ctx, ast.Store) and not isinstance(node, ast.Name)):
        return False
    if hole.id in env:
        return ast.unparse(env[hole.id]) == ast.unparse(node)
    if not fits(hole.id, node, env):
        return False
    env[hole.id] = node
    return True


def filled(template: ast.AST, env: Env) -> Any:
    """A copy of the template with its holes filled."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            if node.id not in env:
                return node
            taken = copy.deepcopy(env[node.id])
            return ast.Name(taken.id, node.ctx) if isinstance(taken, ast.Name) else taken

    return Fill().visit(copy.deepcopy(template))


# --- compiling -------------------------------------------------------------------------------------------------------


def compiled(original: Any, text: str, closure: Mapping[str, object]) -> types.FunctionType:
    """The text as a function that has the original's globals, defaults and closure, and sees the names of `closure`.

    Its source is put where tracebacks and `inspect` look for it.
    """
    original = unwrapped(original)
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in closure.items()}
    filename = f"<fused {original.__module__}.{original.__qualname__} {zlib.crc32(text.encode()):08x}>"
    lines = f"def outer({', '.join(cells)}):\n{textwrap.indent(text, '    ')}\n"
    linecache.cache[filename] = (len(lines), None, lines.splitlines(keepends=True), filename)
    outer = next(c for c in compile(lines, filename, "exec").co_consts if isinstance(c, types.CodeType))
    code = next(c for c in outer.co_consts if isinstance(c, types.CodeType) and c.co_name == original.__name__)
    made = types.FunctionType(
        code, original.__globals__, original.__name__, original.__defaults__, tuple(cells[n] for n in code.co_freevars)
    )
    made.__kwdefaults__, made.__module__, made.__qualname__ = (
        original.__kwdefaults__,
        original.__module__,
        original.__qualname__,
    )
    made.__doc__ = original.__doc__
    return made
