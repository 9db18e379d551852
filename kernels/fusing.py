"""`fuse(module)`: attention, norms, rotary embeddings and gated activations of a diffusers or transformers module run
through the operations of this room.

A module that has something to gain gets a class of its own: a subclass of the same name whose forward is the original's
source with the rules of `rewrites.py` applied. Its instance dict, its parameters and its hooks are never touched, so
that `unfuse` has only the class to put back.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from optimize.errors import InputError

from . import served
from .forwards import DeclinedError, compiled, read
from .recognise import BOUND, norm_kind
from .rewrites import declined, rewritten
from .rules import Site
from .select import Impl, check_impl

RECIPE = "_fused_recipe"  # of a fused class
NORM_BODIES: Mapping[str, str] = {
    "layer_norm": "_fused.norm('layer_norm', self, {x}, impl={impl!r})",
    "rms_norm": "_fused.norm('rms_norm', self, {x}, impl={impl!r})",
    "rms_norm_as_weight": "_fused.norm('rms_norm_as_weight', self, {x}, impl={impl!r})",
    "group_norm": "_fused.group_norm(self, {x}, impl={impl!r})",
}


# --- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What `fuse` found in a module, site by site in the order of its modules."""

    sites: tuple[Site, ...]

    def rows(self) -> list[dict[str, str]]:
        """One mapping per site: path, kind, into (what it became) or why (it did not)."""
        return [asdict(site) for site in self.sites]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """kind -> {"found": ..., "fused": ...}."""
        found = Counter(site.kind for site in self.sites)
        fused = Counter(site.kind for site in self.sites if site.into)
        return {kind: {"found": number, "fused": fused[kind]} for kind, number in sorted(found.items())}

    @property
    def declined(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.into)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `counts`, how often something became each operation, and the sites that were declined."""
        into = Counter(f"{site.kind} -> {site.into}" for site in self.sites if site.into)
        return {
            "counts": self.counts,
            "into": dict(sorted(into.items())),
            "declined": [{"path": s.path, "kind": s.kind, "why": s.why} for s in self.declined],
        }

    def __str__(self) -> str:
        table = [("path", "kind", "became"), *((s.path, s.kind, s.into or f"declined: {s.why}") for s in self.sites)]
        widths = [max(len(row[i]) for row in table) for i in (0, 1)]
        return "\n".join(f"{path:<{widths[0]}}  {kind:<{widths[1]}}  {became}" for path, kind, became in table)


# --- fused classes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a fused class is made of: texts of its forward and, of an attention of diffusers, its processor's call."""

    base: type
    forward: str
    processor: type | None = None
    call: str = ""


@functools.cache
def class_of(recipe: Recipe) -> type:
    """The subclass with the new forward. Modules of one recipe share it, so that torch.compile compiles it once."""
    base: Any = recipe.base
    closure: dict[str, object] = {"_fused": served}
    if recipe.processor is not None:
        call = compiled(recipe.processor.__call__, recipe.call, {"_fused": served})
        closure |= {"_processor": call, "_Processor": recipe.processor}
    body = {
        "forward": compiled(base.forward, recipe.forward, closure),
        "__reduce_ex__": reduced,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        RECIPE: recipe,
    }
    made: Any = type(base)(base.__name__, (base,), body)
    made.forward = body["forward"]  # a base class may have wrapped it
    return made  # type: ignore[no-any-return]


def recipe_of(module: nn.Module) -> Recipe | None:
    found: Recipe | None = type(module).__dict__.get(RECIPE)
    return found


def reduced(module: nn.Module, protocol: Any) -> Any:
    """For pickle and deepcopy: the class cannot be found by name, its recipe can be carried."""
    recipe = recipe_of(module)
    assert recipe is not None
    parts: Any = super(type(module), module).__reduce_ex__(max(2, int(protocol)))
    return (empty, (recipe,), *parts[2:])


def empty(recipe: Recipe) -> Any:
    cls: Any = class_of(recipe)
    return cls.__new__(cls)


# --- one module ------------------------------------------------------------------------------------------------------


def of_norm(module: nn.Module, kind: str, path: str, impl: str) -> tuple[Recipe | None, list[Site]]:
    """A norm that is called as a module, by whatever calls it."""
    plain = kind.removesuffix("_as_weight")
    if "forward" in module.__dict__:
        return None, [Site(path, plain, why=BOUND)]
    argument = read(type(module).forward, bare=False).args.args[1].arg
    body = NORM_BODIES[kind].format(x=argument, impl=impl)
    return Recipe(type(module), f"def forward(self, {argument}):\n    return {body}"), [Site(path, plain, plain)]


def of_processor(module: Any, path: str, paths: Mapping[int, str], impl: str) -> tuple[Recipe | None, list[Site]]:
    """An attention of diffusers, whose maths is in its processor's call."""
    processor = module.processor
    tree = read(type(processor).__call__)
    roots = {tree.args.args[0].arg: processor, tree.args.args[1].arg: module}
    call, sites = rewritten(type(processor).__call__, roots, paths, path, impl)
    if not any(site.kind == "attention" for site in sites):
        sites.append(Site(path, "attention", why=f"{type(processor).__name__} {NO_CALL}"))
    if call is None:
        return None, sites
    forward = read(type(module).forward)
    own = "self.processor(self, "
    text = ast.unparse(forward)
    if text.count(own) != 1:
        raise DeclinedError("its forward does not call its processor once")
    chosen = "(_processor if type(self.processor) is _Processor else type(self.processor).__call__)"
    text = text.replace(own, f"{chosen}(self.processor, self, ")
    return Recipe(type(module), text, type(processor), call), sites


NO_CALL = "calls no attention function that is known: needs scaled_dot_product_attention or diffusers' dispatch"


def of_module(module: nn.Module, path: str, paths: Mapping[int, str], impl: str) -> tuple[Recipe | None, list[Site]]:
    """What one module becomes (None: it stays), and the sites in it."""
    if isinstance(module, nn.MultiheadAttention):
        return None, [Site(path, "attention", why=f"nn.MultiheadAttention {NO_CALL}")]
    try:
        norm = norm_kind(module)
    except DeclinedError as e:
        return None, [Site(path, "norm", why=str(e))]
    if norm is not None:
        return of_norm(module, norm, path, impl)
    if type(module).__module__.startswith("torch.nn."):
        return None, []
    if callable(getattr(module, "processor", None)):
        return of_attention(module, path, paths, impl)
    return of_block(module, path, paths, impl)


def of_attention(module: nn.Module, path: str, paths: Mapping[int, str], impl: str) -> tuple[Recipe | None, list[Site]]:
    try:
        recipe, sites = of_processor(module, path, paths, impl)
    except DeclinedError as e:
        return None, [Site(path, "attention", why=str(e))]
    if recipe is not None and "forward" in module.__dict__:
        return None, declined(sites, BOUND)
    return recipe, sites


def of_block(module: nn.Module, path: str, paths: Mapping[int, str], impl: str) -> tuple[Recipe | None, list[Site]]:
    """Any other module: what its own forward computes."""
    try:
        text, sites = rewritten(type(module).forward, {"self": module}, paths, path, impl)
    except DeclinedError:  # a forward that cannot be read; the modules in it are looked at on their own
        return None, []
    if text is not None and "forward" in module.__dict__:
        return None, declined(sites, BOUND)
    return (None if text is None else Recipe(type(module), text)), sites


# --- the two verbs ---------------------------------------------------------------------------------------------------


def fuse(module: nn.Module, impl: Impl = "auto", *, exclude: Sequence[str] = ()) -> Report:
    """Rewrites the module and all in it, in place, and says for each attention, norm, rotation and gate what it became.

    For inference: the module has to be in eval mode, and calls of it belong under `torch.no_grad()`. Parameters, their
    names, buffers and hooks stay what they are; no value is read, so that a module on meta can be fused. Numbers agree
    within the error budget and not to the bit: norms, their modulation and rotations are computed in fp32 and rounded
    once, where the libraries round after each step (llama and T5 before the product with the weight). A branch that a
    module's own attributes decide (`norm_type`, a norm that is None) is decided now: fuse after LoRA, processors and
    the like are in place. A processor that is set later is called as it is.

    Fusing twice is fusing once: a fused module is unfused first. A copy or a pickle of a fused module is fused.
    `impl` is that of the operations. `exclude` are patterns of module paths (`"mid_block"`, `"*.attn1"`): what they
    match stays as it is, with all that is in it. Raises TypeError for what is no module, ValueError for an unknown
    `impl` and InputError for a module in training mode or a pattern that matches no module.
    """
    check_impl(impl)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected a torch.nn.Module")
    if module.training:
        raise InputError("fuse is for inference", got="a module in training mode", mend="call module.eval() first")
    unfuse(module)
    modules = dict(module.named_modules())
    excluded = excluded_by(exclude, list(modules))
    paths = {id(child): path for path, child in modules.items()}
    open_paths = {key: path for key, path in paths.items() if path not in excluded}
    sites: dict[tuple[str, str], Site] = {}
    recipes = []
    for path, child in modules.items():
        recipe, found = of_module(child, path, paths if path in excluded else open_paths, impl)
        if path in excluded:
            recipe, found = None, [Site(s.path, s.kind, why=f"excluded by {excluded[path]!r}") for s in found]
        recipes.append((child, recipe))
        for site in found:
            if absorbed(sites.get((site.path, site.kind)), site):
                sites[site.path, site.kind] = site
    for child, recipe in recipes:
        if recipe is not None:
            child.__class__ = class_of(recipe)
    return Report(tuple(in_order(sites.values(), list(modules))))


def excluded_by(patterns: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """Path -> the pattern that matches it, or a module that it is in."""
    if isinstance(patterns, str):
        raise TypeError(f"exclude: got the string {patterns!r}, expected a list of patterns")
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = set(fnmatch.filter(paths, pattern))
        if not matched:
            near = difflib.get_close_matches(pattern, paths, 3, 0.4)
            raise InputError(
                "exclude: no module has such a path",
                got=pattern,
                expected=f"one like {', '.join(near)}" if near else "a path of named_modules(), or a pattern of some",
            )
        for path in paths:
            parts = path.split(".")
            if not matched.isdisjoint(".".join(parts[:n]) for n in range(1, len(parts) + 1)):
                found.setdefault(path, pattern)
    return found


def absorbed(known: Site | None, site: Site) -> bool:
    """Whether this says more than what is known of the place: a norm alone is less than one with its neighbours."""
    return known is None or len(site.into) > len(known.into)


def in_order(sites: Any, paths: Sequence[str]) -> Iterator[Site]:
    place = {path: i for i, path in enumerate(paths)}
    yield from sorted(sites, key=lambda site: place.get(site.path, -1))


def unfuse(module: nn.Module) -> None:
    """Gives every fused module in it its own class back; exactly what it was, and nothing where nothing was fused."""
    for child in module.modules():
        recipe = recipe_of(child)
        if recipe is not None:
            child.__class__ = recipe.base
