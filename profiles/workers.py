"""Candidates in processes of their own: what one breaks or eats, the others do not see, and its peak memory is its own.

Requests and answers are lines of JSON. What a backend prints goes to stderr, of which the last words are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from optimize.errors import GateError, InputError, MissingError, OptimizeError

from .timing import Burst, SideFailedError, cores_for

KINDS: Mapping[str, type[OptimizeError]] = {e.__name__: e for e in (InputError, MissingError, GateError)}
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
STEADY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""glibc keeps what is freed, as it mostly comes to do by itself. Where it happens not to, each run faults its
activations in again: eager torch was a seventh slower in one process of three. What the user has set goes first."""


class Worker:
    """A process that runs `python -m MODULE` and answers `call`. It is ended by `close`, or with its parent."""

    def __init__(self, module: str, job: Mapping[str, Any], threads: int = 0) -> None:
        self.words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        env = {**QUIET, **STEADY, **os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            env=env,
        )
        if threads:  # before it has any threads that would not hear of it
            os.sched_setaffinity(self.process.pid, cores_for(threads))
        self.send({"job": dict(job)})

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, request: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.died() from None

    def call(self, name: str, **words: Any) -> Any:
        """The answer to one request. Raises what the other side raised, or SideFailedError where it died."""
        assert self.process.stdout is not None
        self.send({"do": name, "with": words})
        line = self.process.stdout.readline()
        if not line:
            raise self.died()
        answer = json.loads(line)
        if "error" in answer:
            error = answer["error"]
            kind = KINDS.get(error["kind"], SideFailedError)
            raise kind(error["what"], got=error["got"], expected=error["expected"], mend=error["mend"])
        return answer["result"]

    def died(self) -> SideFailedError:
        code = self.process.wait()
        self.words.seek(0)
        last = [line for line in self.words.read().decode(errors="replace").splitlines() if line.strip()][-1:]
        signal = f"signal {-code}" + (" (out of memory?)" if code == -9 else "") if code < 0 else f"exit code {code}"
        return SideFailedError("its process died", got=f"{signal}; {last[0].strip()[:300] if last else 'silent'}")

    def burst(self, ms: float, warmup_ms: float, cold: bool) -> Burst:
        return Burst(**self.call("burst", ms=ms, warmup_ms=warmup_ms, cold=cold))

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.words.close()


def error_as_data(error: BaseException) -> dict[str, Any]:
    """What `Worker.call` makes an error of again. Whatever a backend raises becomes a side that failed."""
    if isinstance(error, OptimizeError):
        parts = {name: str(v) if (v := getattr(error, name)) is not None else None for name in ("got", "expected")}
        return {"kind": type(error).__name__, "what": error.what, **parts, "mend": error.mend}
    text = " ".join(str(error).split())[:600]
    return {
        "kind": type(error).__name__,
        "what": f"{type(error).__name__}: {text}" if text else type(error).__name__,
        "got": None,
        "expected": None,
        "mend": None,
    }


def serve(make: Any) -> None:
    """The other side: reads a job, makes a seat of it, and calls its methods by name until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    seat: Any = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "job" in request:
            seat = make(request["job"])
            continue
        try:
            answer = {"result": getattr(seat, request["do"])(**request["with"])}
        except (
            Exception
        ) as e:  # each backend raises its own kinds: all of them are this candidate's, and said in its row
            answer = {"error": error_as_data(e)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
