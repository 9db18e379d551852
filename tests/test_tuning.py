"""Which config is taken: the user's measurement, the shipped one, the heuristic; and how a measurement is made."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from optimize.errors import MissingError
from optimize.kernels import triton_attention, tuning
from optimize.kernels.kernel import SMS, Kernel
from optimize.kernels.triton_attention import KERNEL, AttentionConfig, AttentionProblem

CPU = torch.device("cpu")
PROBLEM = AttentionProblem(64, "fp16", 4096, 4096)
NAME = "a device"
SM = 90
OTHER = AttentionConfig(64, 64, 4, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPTIMIZE_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    return tuning.cache_path()


def note(config: object) -> dict:
    return {"config": dataclasses.asdict(config), "median_ms": 1.0}  # type: ignore[call-overload]


def test_what_was_written_is_found_for_that_device_and_problem_alone(cache: Path) -> None:
    tuning.write(cache, KERNEL, PROBLEM, NAME, note(OTHER))
    assert tuning.measured_config(cache, KERNEL, PROBLEM, NAME, SM) == OTHER
    assert tuning.measured_config(cache, KERNEL, PROBLEM, "another device", SM) is None
    longer = dataclasses.replace(PROBLEM, keys=8192)
    assert tuning.measured_config(cache, KERNEL, longer, NAME, SM) is None
    tuning.write(cache, KERNEL, longer, NAME, note(OTHER))  # the first stays
    assert tuning.measured_config(cache, KERNEL, PROBLEM, NAME, SM) == OTHER
    assert [p.name for p in cache.parent.iterdir() if p.suffix == ".json"] == [cache.name]


def test_what_other_source_measured_does_not_count(cache: Path) -> None:
    tuning.write(cache, KERNEL, PROBLEM, NAME, note(OTHER))
    table = json.loads(cache.read_text())
    assert table[NAME]["attention"]["digest"] == tuning.build_of(KERNEL)
    table[NAME]["attention"]["digest"] = "0" * 64
    cache.write_text(json.dumps(table))
    tuning.forget()
    assert tuning.measured_config(cache, KERNEL, PROBLEM, NAME, SM) is None
    longer = dataclasses.replace(PROBLEM, keys=8192)
    tuning.write(cache, KERNEL, longer, NAME, note(OTHER))
    assert list(json.loads(cache.read_text())[NAME]["attention"]["configs"]) == [tuning.text_of(longer)]


DIGESTS = """
import importlib.util, sys, types
from optimize.kernels import tuning
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location(path, path)
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(tuning.digest_of(types.SimpleNamespace(jit=module.one_kernel)))
"""
SOURCE = '''"""A kernel."""
import triton
import triton.language as tl


@triton.jit
def helper(x):
    return x + 1


@triton.jit
def one_kernel(out):
    tl.store(out, helper(1))


def heuristic():
    return 4
'''


def test_the_digest_is_of_the_jitted_functions(tmp_path: Path) -> None:
    changes = {"helper": ("x + 1", "x + 2"), "kernel": ("helper(1)", "helper(3)"), "tuner": ("return 4", "return 8"),
               "words": ("A kernel.", "A kernel!"), "nothing": ("", ""),
               "also": ("def heur", "ALSO = ('nothing.py',)\n\n\ndef heur")}  # fmt: skip
    paths = []
    for name, change in changes.items():
        paths.append(tmp_path / f"{name}.py")
        paths[-1].write_text(SOURCE.replace(*change, 1))
    run = subprocess.run([sys.executable, "-c", DIGESTS, *paths], capture_output=True, text=True, check=True)
    found = dict(zip(changes, run.stdout.split(), strict=True))
    assert found["tuner"] == found["words"] == found["nothing"]
    assert len({found["helper"], found["kernel"], found["nothing"], found["also"]}) == 4


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"a device": 3}',
        '{"a device": {"attention": {}}}',
        '{"a device": {"attention": {"configs": [1]}}}',
        "\x00",
    ],
)
def test_a_broken_cache_is_told_of_once_and_ignored(text: str, cache: Path, capsys: pytest.CaptureFixture) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    for _ in range(3):
        assert tuning.measured_config(cache, KERNEL, PROBLEM, NAME, SM) is None
    said = capsys.readouterr().err
    assert said.count("is ignored") == 1 and str(cache) in said and "Delete it, or tune again" in said
    tuning.write(cache, KERNEL, PROBLEM, NAME, note(OTHER))
    assert tuning.measured_config(cache, KERNEL, PROBLEM, NAME, SM) == OTHER


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"block_m": 128, "rows": 3}, "unexpected keyword"),
        (dataclasses.asdict(AttentionConfig(128, 128, 4, 4)), "bytes of shared memory"),
        (dataclasses.asdict(AttentionConfig(128, 64, 8, 2, pack=True)), "no group of heads"),
    ],
)
def test_a_config_that_cannot_be_taken_is_not(
    config: dict, why: str, cache: Path, capsys: pytest.CaptureFixture
) -> None:
    tuning.write(cache, KERNEL, PROBLEM, NAME, {"config": config, "median_ms": 1.0})
    assert tuning.measured_config(cache, KERNEL, PROBLEM, NAME, 89) is None
    assert why in capsys.readouterr().err


def test_the_heuristic_is_taken_where_nothing_was_measured() -> None:
    assert tuning.config_for(KERNEL, PROBLEM, CPU) == KERNEL.heuristic(PROBLEM, tuning.INTERPRETED_SM)


def test_a_look_up_that_was_made_is_cheap() -> None:
    tuning.config_for(KERNEL, PROBLEM, CPU)
    best = min(timed(lambda: tuning.config_for(KERNEL, PROBLEM, CPU), 1000) for _ in range(5))
    assert best < 20e-6  # seconds; about 1 on an idle machine


def timed(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def test_the_shipped_table_is_of_this_source() -> None:
    if not tuning.SHIPPED.exists():
        pytest.skip("needs kernels/tuned.json, which the GPU suite writes")
    from optimize.kernels import aot

    digests = {aot.kernel_of(name).name: tuning.build_of(aot.kernel_of(name)) for name in aot.KERNELS}
    for kernels in tuning.table_of(tuning.SHIPPED).values():
        for name, entry in kernels.items():
            assert entry["digest"] == digests[name], f"{name} changed since it was tuned: run make gpu"


# --- the search space ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_heuristic_is_in_the_pruned_space(dtype: str, sm: int) -> None:
    """For every kind of problem: what the heuristic takes is never what prune refuses."""
    for head_dim in (1, 32, 40, 64, 72, 80, 96, 128, 160, 256, 512):
        for queries, keys, group, bias in (
            (1, 1, 1, ""),
            (1, 4096, 4, ""),
            (16, 128, 1, "bool"),
            (4096, 4096, 1, dtype),
        ):
            problem = AttentionProblem(head_dim, dtype, queries, keys, group=group, bias=bias)
            config = KERNEL.heuristic(problem, sm)
            assert KERNEL.prune(problem, config, sm) is None, (problem, config)
            assert config in tuning.candidates(KERNEL, problem, sm)
            assert all(KERNEL.prune(problem, c, sm) is None for c in tuning.candidates(KERNEL, problem, sm))


@pytest.mark.parametrize(
    ("problem", "config", "sm", "why"),
    [
        (PROBLEM, AttentionConfig(128, 128, 8, 4), 89, "bytes of shared memory, and there are 101376"),
        (PROBLEM, AttentionConfig(128, 128, 4, 1), 80, "registers a thread"),
        (PROBLEM, AttentionConfig(128, 64, 8, 1, pack=True), 80, "no group of heads to pack"),
        (dataclasses.replace(PROBLEM, queries=32), AttentionConfig(128, 64, 8, 1), 80, "128 rows in a block, and"),
        (dataclasses.replace(PROBLEM, keys=32), AttentionConfig(64, 64, 4, 1), 80, "64 keys in a block, and there"),
        (dataclasses.replace(PROBLEM, keys=64), AttentionConfig(64, 64, 4, 2), 80, "one block has no loop"),
        (PROBLEM, AttentionConfig(32, 16, 8, 1), 80, "less than 4 scores a thread"),
        (AttentionProblem(512, "fp16", 64, 4096), AttentionConfig(64, 16, 8, 1), 100, "tensor memory"),
    ],
)  # fmt: skip
def test_prune_says_why(problem: AttentionProblem, config: AttentionConfig, sm: int, why: str) -> None:
    assert why in (KERNEL.prune(problem, config, sm) or "")


def test_a_head_is_padded_little() -> None:
    found = {d: triton_attention.chunks(d) for d in (1, 16, 40, 64, 72, 80, 96, 112, 160, 512)}
    assert found == {1: (16, 0), 16: (16, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32),
                     112: (128, 0), 160: (128, 32), 512: (512, 0)}  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rounds:
    rounds: int


@dataclasses.dataclass(frozen=True)
class Summed:
    size: int


SUMMED: Kernel[Summed, Rounds] = Kernel(
    "summed",
    KERNEL.jit,
    Rounds,
    lambda problem, sm: Rounds(400),
    lambda problem, sm: map(Rounds, (1, 7, 40, 400, 5000)),
    lambda problem, config, sm: "too long" if config.rounds > 1000 else None,
    KERNEL.compiled,
    (),
)
"""Its config is how long it takes; 7 is wrong and 40 fails."""


def launch_of(config: Rounds) -> Callable[[], int]:
    def launch() -> int:
        if config.rounds == 40:
            raise RuntimeError("out of resource: shared memory")
        for _ in range(config.rounds):
            sum(range(200))
        return 3 if config.rounds == 7 else 2

    return launch


def clocked(call: Callable[[], object]) -> float:
    return 1e3 * min(timed(call, 1) for _ in range(5))


def test_the_fastest_right_config_wins_and_is_remembered(cache: Path) -> None:
    problem = Summed(200)
    found = tuning.tune(SUMMED, problem, launch_of, CPU, wrong=lambda r: None if r == 2 else f"{r}", measure=clocked)
    assert found == Rounds(1) == tuning.config_for(SUMMED, problem, CPU)
    entry = json.loads(cache.read_text())["cpu"]["summed"]["configs"]["size=200"]
    assert entry["config"] == {"rounds": 1} and entry["tried"] == 2 and entry["spread"] > 1
    assert entry["refused"] == [
        "Rounds(rounds=7): 3",
        "Rounds(rounds=40): RuntimeError: out of resource: shared memory",
    ]


def test_a_wrong_config_cannot_win() -> None:
    found = tuning.tune(SUMMED, Summed(1), launch_of, CPU, wrong=lambda r: None, measure=clocked)
    assert found == Rounds(1)
    right = lambda r: None if r == 3 else f"gives {r}"  # noqa: E731
    assert tuning.tune(SUMMED, Summed(2), launch_of, CPU, wrong=right, measure=clocked) == Rounds(7)


def test_no_config_that_runs_is_an_error() -> None:
    with pytest.raises(MissingError, match="no config of summed runs"):
        tuning.tune(SUMMED, Summed(3), launch_of, CPU, wrong=lambda r: "never right", measure=clocked)


def test_tuning_without_a_gpu_says_so() -> None:
    with pytest.raises(MissingError, match="tuning needs a GPU"), tuning.tuning_on(CPU):
        pass


def test_a_launch_tunes_the_kernels_that_it_meets(cache: Path) -> None:
    """The launch asks for its config itself; each problem is measured once."""
    calls: list[int] = []

    def launch(x: torch.Tensor) -> torch.Tensor:
        config = tuning.config_for(SUMMED, Summed(9), x.device)
        calls.append(config.rounds)
        launch_of(config)()
        return x + (config.rounds == 7)

    tuning.DONE.clear()
    tuning.tune_launch(launch, (torch.ones(3),), CPU, clocked)
    assert tuning.config_for(SUMMED, Summed(9), CPU) == Rounds(1)
    assert set(calls) == {400, 1, 7, 40}
    entry = json.loads(cache.read_text())["cpu"]["summed"]["configs"]["size=9"]
    assert any("differs by" in why for why in entry["refused"])
    calls.clear()
    tuning.tune_launch(launch, (torch.ones(3),), CPU, clocked)
    assert calls == [1]


def test_a_result_that_is_no_number_is_wrong() -> None:
    one = [torch.ones(3)]
    assert tuning.why_different(one, [torch.ones(3).double()]) is None
    assert tuning.why_different([torch.full((3,), torch.nan)], [torch.ones(3).double()]) is not None


def test_two_processes_write_into_one_cache(cache: Path) -> None:
    code = (
        "import sys; from optimize.kernels import tuning; from optimize.kernels.triton_attention import *\n"
        "for i in range(20):\n"
        "    p = AttentionProblem(int(sys.argv[1]), 'fp16', 4096, 1 << i)\n"
        "    tuning.write(tuning.cache_path(), KERNEL, p, 'a device', {'config': {}, 'median_ms': 1.0})"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(head)], env={**os.environ}) for head in (40, 64)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(json.loads(cache.read_text())[NAME]["attention"]["configs"]) == 40
