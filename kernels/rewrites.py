"""One function rewritten: read, settled for its module, every rule applied, written out again."""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Mapping, Sequence

from .forwards import UNKNOWN, DeclinedError, Scope, read
from .matching import Expressions, apply_statements, blocks, expression, parsed, sequence
from .recognise import NORMS, attention_call
from .rules import LEFT, RULES, Rewriting, Site
from .sums import add_before_norm


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
