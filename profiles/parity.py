"""Parity: an artifact's outputs against eager fp32 on the same feeds, at sizes that were traced and that were not.

The rule by precision: fp32 within 1e-4 of the reference; fp16 and bf16 within 1.05 times the error that eager itself
makes in that precision. Where parts of an fp16 graph stay in fp32, eager fp16 may overflow: its numbers get the range
of fp32 then, and keep fp16's 11 bits (`compile/wide.py`). All errors are relative, in the L2 norm; the largest single
difference stands beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optimize.compile.feeds import feeds_for
from optimize.compile.records import OutputError, Parity, ShapeParity
from optimize.compile.runners import EagerRunner
from optimize.compile.spec import Component
from optimize.errors import GateError, InputError

FP32_LIMIT = 1e-4
FAR = 1e4
"""A number that agrees, and is so large and so much larger than the rest, is a mask's: see `masked`."""
EAGER_FACTOR = 1.05
MANY, FEW_DRAWS, MANY_DRAWS = 32768, 4, 32
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""Half a unit in the last place: eager can be exact by luck (an identity), an artifact may still round once."""

Tensors = Mapping[str, torch.Tensor]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Reference:
    """Eager fp32's outputs and, below fp32, eager's own in that precision, for one set of sizes and one seed."""

    name: str
    sizes: Mapping[str, int]
    feeds: Tensors
    exact: Tensors
    own: Tensors | None


def rule_of(precision: str, wide: bool = False) -> str:
    if precision == "fp32":
        return f"relative error <= {FP32_LIMIT:g}"
    whose = "that of eager with fp16's 11 bits and fp32's range" if wide else f"eager {precision}'s own"
    return f"relative error <= {EAGER_FACTOR} x {whose}"


def references(
    component: Component,
    precision: str,
    *,
    streamed: bool,
    say: Callable[[str], None],
    draws: int = FEW_DRAWS,
    wide: bool = False,
) -> list[Reference]:
    """Runs eager at all sets of sizes: fp32 first, then the precision itself (one model in memory at a time).

    Below fp32 two errors are compared, and with few numbers their ratio is noise: outputs with fewer than `MANY`
    numbers are drawn up to `draws` times.
    """
    say("eager fp32")
    sets = component.shape_sets()

    def drawn(name: str, seed: int) -> tuple[str, Sizes, Tensors]:
        return name, sets[name], feeds_for(component.inputs, sets[name], precision, seed)

    with EagerRunner(component, "fp32", streamed=streamed) as eager:
        cases = [drawn(name, 0) for name in sets]
        try:
            exact = eager.infer_all([widened(feeds) for _, _, feeds in cases])
        except IndexError as e:
            raise InputError(
                f"the forward of {component.name} fails on sample feeds",
                got=f"{type(e).__name__}: {e}",
                expected="inputs that it takes",
                mend='say what an input holds, as TensorSpec("ids", ..., fill="ids:1000")',
            ) from e
        if precision != "fp32":
            least = {name: min(t.numel() for t in out.values()) for (name, _, _), out in zip(cases, exact, strict=True)}
            more = [
                drawn(name, seed)
                for name in sets
                for seed in range(1, min(draws, math.ceil(MANY / max(least[name], 1))))
            ]
            cases += more
            exact += eager.infer_all([widened(feeds) for _, _, feeds in more])
    own: Sequence[Tensors | None] = [None] * len(cases)
    if precision != "fp32":
        say(f"eager {precision}")
        with EagerRunner(component, precision, streamed=streamed, wide=wide) as eager:
            own = eager_or_gate(eager, [feeds for _, _, feeds in cases])
    found = [Reference(*case, e, o) for case, e, o in zip(cases, exact, own, strict=True)]
    return sorted(found, key=lambda r: list(sets).index(r.name))


def eager_or_gate(eager: EagerRunner, feeds: Sequence[Tensors]) -> Sequence[Tensors]:
    """Eager's outputs; GateError where the model itself cannot run in this precision."""
    try:
        return eager.infer_all(feeds)
    except RuntimeError as e:
        raise GateError(
            f"{eager.component.name} cannot run in {eager.precision} even in eager mode",
            got=str(e)[:300],
            mend="the model mixes types: cast inside its forward, or export it in fp32",
        ) from e


def widened(feeds: Tensors) -> dict[str, torch.Tensor]:
    """The same numbers in fp32."""
    return {k: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for k, t in feeds.items()}


def error_of(name: str, results: list[tuple[Reference, Tensors]]) -> OutputError:
    """Compares one output over all seeds of a set of sizes. Sizes that differ, or values that are not finite where
    the reference is, are infinitely off."""
    got = [outputs[name] for _, outputs in results]
    exact = [r.exact[name] for r, _ in results]
    own = [r.own[name] for r, _ in results if r.own is not None]
    relative, worst = distance(got, exact, own)
    return OutputError(
        name=name,
        relative=relative,
        worst=worst,
        finite=all(bool(torch.isfinite(t.float()).all()) for t in got),
        eager=distance(own, exact, got)[0] if own else None,
    )


def distance(
    got: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], other: Sequence[torch.Tensor] = ()
) -> tuple[float, float]:
    """(L2, largest) difference of several tensors together, relative to the reference's norm and largest magnitude. Of
    whole numbers the share that differs: ids have no size. `other` is what the same precision gives elsewhere."""
    if any(a.shape != b.shape for a, b in zip(got, exact, strict=True)):
        return math.inf, math.inf
    a, b = (torch.cat([t.double().reshape(-1) for t in tensors]) for tensors in (got, exact))
    if not b.numel():
        return 0.0, 0.0
    if not exact[0].is_floating_point():
        share = float((a != b).double().mean())
        return share, share
    same = a == b  # infinities that agree (a mask) are no difference
    fits = bool(other) and all(o.shape == e.shape for o, e in zip(other, exact, strict=True))
    agrees = same | (a == torch.cat([t.double().reshape(-1) for t in other])) if fits else same
    hidden = masked(agrees & torch.isfinite(a), b) | (same & ~torch.isfinite(b))
    difference, size = torch.where(same | hidden, 0.0, a - b), torch.where(hidden, 0.0, b)
    relative = float(torch.linalg.vector_norm(difference)) / max(float(torch.linalg.vector_norm(size)), 1e-30)
    worst = float(difference.abs().max()) / max(float(size.abs().max()), 1e-30)
    return (math.inf if math.isnan(relative) else relative), (math.inf if math.isnan(worst) else worst)


def masked(agrees: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Where a mask's number stands: what agrees and is ten thousand times larger than all the rest is not the output's
    size, and would hide any error of what is."""
    far = agrees & torch.isfinite(exact) & (exact.abs() >= FAR)
    rest = exact[~far].abs()
    rest = rest[torch.isfinite(rest)]
    hides = bool(far.any()) and bool(rest.numel()) and bool(exact[far].abs().min() > FAR * rest.max())
    return far if hides else torch.zeros_like(far)


def within(error: OutputError, precision: str) -> bool:
    if precision == "fp32":
        return error.relative <= FP32_LIMIT and error.worst <= 10 * FP32_LIMIT
    if error.eager is None:
        return False
    if math.isinf(error.eager):  # eager itself overflows here: there is nothing to be held to, and nothing proved
        return False
    return error.relative <= max(EAGER_FACTOR * error.eager, ROUNDING[precision])


def parity_of(
    outputs_by_shape: Iterable[Tensors],
    component: Component,
    precision: str,
    known: list[Reference],
    *,
    backend: str,
    how: str = "whole",
    notes: list[str] | None = None,
    wide: bool = False,
) -> Parity:
    """Compares the artifact's outputs, one set for each reference in their order."""
    results = list(zip(known, outputs_by_shape, strict=True))
    shapes = []
    for name in dict.fromkeys(r.name for r in known):
        group = [pair for pair in results if pair[0].name == name]
        errors = [error_of(output, group) for output in component.outputs]
        passed = all(within(e, precision) for e in errors)
        shapes.append(ShapeParity(name=name, sizes=dict(group[0][0].sizes), outputs=errors, passed=passed))
    return Parity(
        backend=backend,
        reference="eager fp32",
        how=how,
        rule=rule_of(precision, wide),
        shapes=shapes,
        passed=all(s.passed for s in shapes),
        notes=notes or [],
    )


def marginal(parity: Parity) -> bool:
    """Whether a miss is so small that it may be noise of few numbers: more draws will tell."""
    outputs = [o for s in parity.shapes for o in s.outputs]
    return all(o.finite and o.eager is not None and o.relative <= 1.3 * o.eager for o in outputs)


def worst_miss(parity: Parity, precision: str) -> tuple[ShapeParity, OutputError]:
    """The set of sizes and the output that are furthest over the rule."""
    misses = [(s, o) for s in parity.shapes for o in s.outputs if not within(o, precision)]
    return max(misses, key=lambda pair: pair[1].relative / max(pair[1].eager or FP32_LIMIT, 1e-12))


def as_text(parity: Parity) -> dict[str, Any]:
    """One line per set of sizes, for tables."""
    return {s.name: f"{max(o.relative for o in s.outputs):.1e}" for s in parity.shapes}
