"""Every error that the product raises on purpose, and the exit code that the command line gives it.

A message has up to four parts: what went wrong, what was got, what was expected, and how to mend it. User-facing
errors derive from `OptimizeError`; `InternalError` is a bug of ours and stands apart, so that nobody catches it by
catching the former.
"""

from __future__ import annotations


class OptimizeError(Exception):
    """Something that the user can mend. `exit_code` is what the command line returns for it."""

    exit_code = 2

    def __init__(self, what: str, *, got: object = None, expected: object = None, mend: str | None = None) -> None:
        self.what, self.got, self.expected, self.mend = what, got, expected, mend
        parts = [what]
        if got is not None:
            parts.append(f"  got: {got}")
        if expected is not None:
            parts.append(f"  expected: {expected}")
        if mend:
            parts.append(f"  mend: {mend}")
        super().__init__("\n".join(parts))


class InputError(OptimizeError):
    """The words or the input are wrong: an unknown name, a bad axis, a broken file."""


class GateError(OptimizeError):
    """A gate was not passed: parity, a receipt, a budget, a digest."""

    exit_code = 1


class MissingError(OptimizeError):
    """Something is not there: a package, a GPU, disk space."""

    exit_code = 3


class InternalError(Exception):
    """A bug of ours. Please report it with the text and the command."""
