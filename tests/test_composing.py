"""Time per image: calls as pipelines make them, sums that are exact and say what they lack, and the whole run."""

from __future__ import annotations

import string
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import optimize
from optimize.compile.architectures import ARCHITECTURES, PIPELINES
from optimize.compile.bundle import record_of
from optimize.compile.records import ComponentRecord
from optimize.compile.runners import Bound, EagerRunner, Feeds, loaded_module
from optimize.compile.sources import demo_folder, source_from_text
from optimize.compile.spec import Component
from optimize.errors import InputError
from optimize.profiles.composing import (
    Calls,
    batch_factor,
    calls_of,
    denoiser_steps,
    image_rows,
    is_guided,
    pipeline_times,
)
from optimize.profiles.drawing import Drawing, hollow
from optimize.profiles.end_to_end import Typed, drawing_at, measure_pipeline, with_measured
from optimize.profiles.schema import Pick, Row, RowParity, RowQuality, Timing
from optimize.quantize.pipelines import load_pipeline

# --- how often --------------------------------------------------------------------------------------------------------


def network(name: str, **config: Any) -> torch.nn.Module:
    """The tiny network of an architecture, random, as its library made it."""
    import diffusers

    if config:
        torch.manual_seed(0)
        return diffusers.DiTTransformer2DModel(**{**ARCHITECTURES[name].values(tiny=True), **config})
    module = loaded_module(next(iter(source_from_text(f"arch:{name}@tiny").components)), "fp32")
    del module.__dict__["forward"]  # the adapter's
    return module


def tokenizer_for(part: str, module: torch.nn.Module) -> Any:
    import transformers

    if type(module).__name__ != "T5EncoderModel":
        return transformers.CLIPTokenizer.from_pretrained(demo_folder() / "tokenizer")
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    return transformers.T5Tokenizer(vocab=[*marks, *((c, -3.0) for c in string.ascii_lowercase)], extra_ids=0)


CLASSES = {
    "sd15": ("StableDiffusionPipeline", "DDIMScheduler"),
    "sdxl-base": ("StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
    "sd35-medium": ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "flux-dev": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "pixart-sigma": ("PixArtSigmaPipeline", "DPMSolverMultistepScheduler"),
    "dit": ("DiTPipeline", "DDIMScheduler"),
    "ddpm": ("DDPMPipeline", "DDIMScheduler"),
}


def tiny_pipeline(name: str) -> Any:
    import diffusers

    cls, scheduler = (getattr(diffusers, word) for word in CLASSES[name])
    if name == "dit":
        parts = {"transformer": network("dit-xl-2-256", num_embeds_ada_norm=1000), "vae": network("vae-sd15")}
    elif name == "ddpm":
        parts = {"unet": network("ddpm-cifar10")}
    else:
        parts = {part: network(key) for part, key in PIPELINES[name].items()}
    words: dict[str, Any] = {
        part.replace("text_encoder", "tokenizer"): tokenizer_for(part, module)
        for part, module in parts.items()
        if part.startswith("text_encoder")
    }
    if name == "sd15":
        words |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = cls(scheduler=scheduler(), **parts, **words)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def records_of(pipe: Any, folder: Path) -> dict[str, ComponentRecord]:
    pipe.save_pretrained(folder)
    return {c.name: record_of(c) for c in source_from_text(str(folder)).components}


def words_for(name: str, steps: int, guidance: float, images: int) -> dict[str, Any]:
    words: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
    if name == "ddpm":
        return {**words, "batch_size": images, "output_type": "np"}
    if name == "dit":
        return {**words, "class_labels": list(range(images)), "guidance_scale": guidance, "output_type": "np"}
    words |= {"prompt": ["a cat", "the moon", "red"][:images], "height": 64, "width": 64, "guidance_scale": guidance}
    return {**words, **({"use_resolution_binning": False, "clean_caption": False} if name == "pixart-sigma" else {})}


@pytest.mark.parametrize("name", CLASSES)
def test_calls_are_those_that_the_pipeline_makes(name: str, tmp_path: Path) -> None:
    """With and without guidance, one image and three: how often each network is called, and with what batch."""
    pipe = tiny_pipeline(name)
    records = records_of(pipe, tmp_path / "pipe")
    for steps, guidance, images in ((3, 5.0, 1), (2, 5.0, 3), (2, 1.0, 1)):
        with optimize.watch(pipe) as seen, torch.no_grad():
            pipe(**words_for(name, steps, guidance, images))
        found = {p.component: [(s.batch, s.calls) for s in p.sizes] for p in seen.parts}
        counted = calls_of(records, steps, guidance > 1, images)
        assert found == {n: [(c.batch, c.count)] for n, c in counted.items() if c.count}, (steps, guidance, images)


def test_a_controlnet_is_called_as_the_denoiser() -> None:
    records = {
        n: record_of(next(iter(source_from_text(f"arch:{a}@tiny").components)))
        for n, a in {"unet": "sd15-unet", "controlnet": "controlnet-sd15", "text_encoder": "clip-l"}.items()
    }
    assert calls_of(records, 7, True) == {"unet": Calls(7, 2), "controlnet": Calls(7, 2), "text_encoder": Calls(2, 1)}
    assert [batch_factor(records, n, g) for n in records for g in (True, False)] == [2, 1, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("scheduler", "calls"), [("DDIMScheduler", 5), ("HeunDiscreteScheduler", 9), ("PNDMScheduler", 6)]
)
def test_schedulers_that_call_more_often_than_they_have_steps(scheduler: str, calls: int, tmp_path: Path) -> None:
    """Counted from the scheduler's own file, and seen on the pipeline."""
    import diffusers

    pipe = load_pipeline(demo_folder())
    words = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **words)
    pipe.save_pretrained(tmp_path)
    assert denoiser_steps(tmp_path, 5) == calls
    with optimize.watch(pipe) as seen:
        pipe("one", num_inference_steps=5, height=32, width=32, output_type="latent")
    assert next(p.calls for p in seen.parts if p.component == "unet") == calls


def test_what_is_no_pipeline_has_as_many_calls_as_steps(tmp_path: Path) -> None:
    assert denoiser_steps(tmp_path, 7) == 7
    assert [is_guided(demo_folder(), g) for g in (None, 1.0, 3.0)] == [True, False, True]


# --- the sum ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_records() -> dict[str, ComponentRecord]:
    return {c.name: record_of(c) for c in source_from_text("demo").components}


def row(
    component: str,
    ms: float | None,
    batch: int = 1,
    candidate: str = "eager fp32",
    shape: str = "small",
    state: Any = "measured",
    why: str = "",
) -> Row:
    backend, _, precision = candidate.partition(" ")
    timing = ms and Timing(
        median_ms=ms,
        p10_ms=ms,
        p90_ms=ms,
        p95_ms=ms,
        p99_ms=ms,
        runs=9,
        rounds_ms=[ms],
        spread=0,
        drift=0,
        attempts=1,
        stable=True,
        clock="monotonic",
    )
    parity = RowParity(output="out", relative=0, limit=1, rule="none", passed=True)
    return Row(
        component=component,
        role=component,
        shape=shape,
        sizes={"batch": batch, "height": 32},
        backend=backend,
        precision=precision,
        state=state,
        why=why,
        timing=timing or None,
        parity=parity if ms else None,
    )


EAGER = (
    row("text_encoder", 2.0),
    row("unet", 10.0),
    row("unet", 16.0, batch=2, shape="small guided"),
    row("vae_decoder", 5.0),
)


def test_the_sum_takes_each_call_at_its_own_batch(demo_records: dict[str, ComponentRecord]) -> None:
    (guided,), missing = pipeline_times(EAGER, demo_records, 7, True)
    assert not missing and guided.notes == ()
    assert [(p.component, p.calls, p.ms) for p in guided.parts] == [
        ("text_encoder", 2, 4.0),
        ("unet", 7, 112.0),
        ("vae_decoder", 1, 5.0),
    ]
    assert (guided.variant, guided.shape, guided.steps, guided.guidance) == ("eager fp32", "small", 7, True)
    assert guided.composed_ms == 121.0 and guided.measured_ms is None
    (plain,), missing = pipeline_times(EAGER, demo_records, 7, False)
    assert not missing and plain.composed_ms == 2 + 70 + 5
    (heun,), _ = pipeline_times(EAGER, demo_records, 7, False, calls=13)
    assert heun.composed_ms == 2 + 130 + 5 and heun.notes == ("the scheduler calls the denoiser 13 times for 7 steps",)


def test_nothing_is_scaled(demo_records: dict[str, ComponentRecord]) -> None:
    """Without a row at guidance's batch the pair is two calls, and the sum says so."""
    rows = [r for r in EAGER if r.sizes["batch"] == 1]
    (time_,), missing = pipeline_times(rows, demo_records, 7, True)
    assert not missing and time_.composed_ms == 4 + 140 + 5
    assert time_.parts[1].calls == 14 and "unet: not measured at batch 2" in time_.notes[0]


def test_several_images_in_a_run_share_it(demo_records: dict[str, ComponentRecord]) -> None:
    rows = [
        row("text_encoder", 3.0, 4),
        row("unet", 60.0, 8, shape="other"),
        row("unet", 33.0, 4),
        row("vae_decoder", 20.0, 4),
    ]
    (time_,), missing = pipeline_times(rows, demo_records, 7, True)
    assert not missing and time_.notes == ()
    assert time_.composed_ms == pytest.approx((2 * 3 + 7 * 60 + 20) / 4)
    assert [p.calls for p in time_.parts] == [0.5, 1.75, 0.25]


def test_what_was_not_measured_so_runs_as_something_that_was(demo_records: dict[str, ComponentRecord]) -> None:
    rows = [
        *EAGER,
        row("unet", 3.0, candidate="onnxruntime int8"),
        row("unet", 4.0, 2, candidate="onnxruntime int8", shape="small guided", state="inconclusive"),
        row("vae_decoder", 4.0, candidate="onnxruntime fp32"),
        row("vae_decoder", None, candidate="onnxruntime int8", state="failed", why="out of memory"),
    ]
    times, missing = pipeline_times(rows, demo_records, 5, True)
    assert not missing and [t.variant for t in times] == ["eager fp32", "onnxruntime int8", "onnxruntime fp32"]
    mixed = times[1]
    assert [p.candidate for p in mixed.parts] == ["eager fp32", "onnxruntime int8", "onnxruntime fp32"]
    assert mixed.composed_ms == 4 + 20 + 4
    said = " | ".join(mixed.notes)
    assert "text_encoder as eager fp32: as onnxruntime int8 it was not profiled" in said
    assert "vae_decoder as onnxruntime fp32: as onnxruntime int8 out of memory" in said
    assert "unet as onnxruntime int8: its latency is inconclusive" in said


def test_picks_are_a_variant(demo_records: dict[str, ComponentRecord]) -> None:
    rows = [*EAGER, row("vae_decoder", 1.0, candidate="aoti fp32")]
    picks = [
        Pick(component=c, shape="small", backend=b, precision="fp32", latency_ms=1, why="")
        for c, b in {"text_encoder": "eager", "unet": "eager", "vae_decoder": "aoti"}.items()
    ]
    picked = pipeline_times(rows, demo_records, 3, False, picks=picks)[0][-1]
    assert picked.variant == "picked" and picked.composed_ms == 2 + 30 + 1 and picked.notes == ()


def test_a_variant_is_a_row_for_the_front(demo_records: dict[str, ComponentRecord]) -> None:
    """Latency and rounds are the parts' sums, quality is that of the worst part."""
    rows = [*EAGER, row("unet", 6.0, 1, candidate="onnxruntime int8", state="inconclusive", why="wild")]
    good, bad = (
        RowQuality(output="x", cosine=c, lowest=c, snr_db=30, psnr_db=30, samples=1, data="") for c in (0.9999, 0.99)
    )
    rows = [r.model_copy(update={"quality": bad if "int8" in r.candidate else good}) for r in rows]
    times, _ = pipeline_times(rows, demo_records, 7, False)
    eager, int8 = image_rows(rows, times)
    assert (eager.candidate, int8.candidate) == ("eager fp32", "onnxruntime int8")
    assert eager.timing and int8.timing and eager.timing.median_ms == times[0].composed_ms == 77
    assert int8.timing.median_ms == times[1].composed_ms == 2 + 42 + 5
    assert int8.quality == bad and eager.quality == good
    assert (eager.state, int8.state) == ("measured", "inconclusive")
    assert len(eager.timing.rounds_ms) == len(rows[0].timing.rounds_ms)  # type: ignore[union-attr]


def test_a_sum_that_lacks_a_part_is_none(demo_records: dict[str, ComponentRecord]) -> None:
    times, missing = pipeline_times(EAGER[1:], demo_records, 3, True)
    assert not times and missing == [
        "time per image at small as eager fp32: text_encoder was not profiled at these sizes"
    ]
    failed = [row("text_encoder", None, state="failed", why="broken"), *EAGER[1:]]
    times, missing = pipeline_times(failed, demo_records, 3, True)
    assert not times and "text_encoder was measured at batch 1 as none" in missing[0]
    bert = {"bert": record_of(source_from_text("arch:bert-base@tiny").components[0])}
    assert pipeline_times([], bert, 3, True) == ([], ["time per image: there is no denoiser among the components"])


# --- the run ----------------------------------------------------------------------------------------------------------

DRAWN = ("text_encoder", "unet", "vae_decoder")


def drawing(steps: int = 6, images: int = 1) -> Drawing:
    return Drawing(("a handwritten seven",) * images, tuple(range(images)), steps, 3.0, 32, 32, images)


def demo_parts() -> dict[str, tuple[Component, Any, str]]:
    return {c.name: (c, EagerRunner(c), "fp32") for c in source_from_text("demo").components if c.name in DRAWN}


def slow_parts() -> dict[str, tuple[Component, Any, str]]:
    """Each network sleeps for long beside its own time: what else the machine does changes little."""
    seconds = {"text_encoder": 0.02, "unet": 0.04, "vae_decoder": 0.1}
    return {name: (c, Slowed(c, seconds[name]), "fp32") for name, (c, _, _) in demo_parts().items()}


def timed_rows(steps_of: Mapping[str, tuple[int, int]]) -> list[Row]:
    """By a plain loop, at the sizes that the demo's pipeline has: (rows, tokens) by component."""
    from optimize.compile.feeds import feeds_for

    rows = []
    for component, runner, _ in slow_parts().values():
        batch, tokens = steps_of[component.name]
        sizes = {"batch": batch, "height": 32, "width": 32, "tokens": tokens}
        feeds = feeds_for(component.inputs, {n: sizes[n] for n in component.axes}, "fp32", 0)
        with runner:
            run, times = runner.bind(feeds), []
            for _ in range(15):
                begin = time.perf_counter()
                run()
                times.append((time.perf_counter() - begin) * 1e3)
        rows.append(row(component.name, sorted(times)[7], batch, shape="guided" if batch == 2 else "small"))
        if batch == 2:  # at the pipeline's own batch there is none: it would not be taken
            rows.append(row(component.name, 1e6, 1))
    return rows


def test_the_sum_and_the_run_agree(demo_records: dict[str, ComponentRecord]) -> None:
    rows = timed_rows({"text_encoder": (1, 16), "unet": (2, 16), "vae_decoder": (1, 16)})
    (composed,), missing = pipeline_times(rows, demo_records, 12, True)
    measured = measure_pipeline(demo_folder(), slow_parts(), drawing(12))
    both = with_measured(composed, measured)
    assert not missing and len(both.rounds_ms) == 3 and both.measured_ms == sorted(both.rounds_ms)[1]
    assert measured.calls() == {p.component: p.calls for p in composed.parts}
    assert not any("was called" in note for note in both.notes)
    assert "in no network" in both.notes[-1]
    assert 1 / 1.5 < both.measured_ms / (both.composed_ms + measured.outside_ms) < 1.5


def test_a_run_has_the_sizes_of_the_rows(demo_records: dict[str, ComponentRecord]) -> None:
    rows = [row("unet", 1.0, 2), row("vae_decoder", 1.0, 3)]
    rows = [r.model_copy(update={"sizes": {**r.sizes, "width": 64}}) for r in rows]
    assert drawing_at("small", rows, demo_records, ["a", "b"], 7, None) == Drawing(
        ("a", "b", "a"), (0, 1, 2), 7, None, 32, 64, 3
    )
    with pytest.raises(InputError, match="no decoder with a height"):
        drawing_at("small", rows[:1], demo_records, ["a"], 7, None)


class Slowed(EagerRunner):
    def __init__(self, component: Component, seconds: float) -> None:
        super().__init__(component)
        self.seconds = seconds

    def bind(self, feeds: Feeds) -> Bound:
        run = super().bind(feeds)

        def slowly() -> dict[str, torch.Tensor]:
            time.sleep(self.seconds)
            return run()

        return slowly


class Shared(EagerRunner):
    """Gives each run's result in the memory of the last one, as CUDA graphs do."""

    def __init__(self, component: Component) -> None:
        super().__init__(component)
        self.memory: dict[str, torch.Tensor] = {}

    def bind(self, feeds: Feeds) -> Bound:
        run = super().bind(feeds)

        def again() -> dict[str, torch.Tensor]:
            for name, tensor in run().items():
                self.memory.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
            return self.memory

        return again


def test_results_that_the_next_run_overwrites_are_kept() -> None:
    """The prompt's embedding outlives the run on the empty one."""
    (component,) = (c for c in source_from_text("demo").components if c.name == "text_encoder")
    with Typed(component, Shared(component), "fp32") as runner:
        first, second = (runner.infer({"input_ids": torch.full((1, 16), i)}) for i in (1, 2))
    assert all(not torch.equal(first[n], second[n]) for n in first)


def test_a_slow_runner_is_seen_in_the_run(demo_records: dict[str, ComponentRecord]) -> None:
    parts = demo_parts()
    parts["vae_decoder"] = (parts["vae_decoder"][0], Slowed(parts["vae_decoder"][0], 0.3), "fp32")
    measured = measure_pipeline(demo_folder(), parts, drawing(2, images=3), rounds=2)
    found = {p.component: p for p in measured.parts}
    assert found["vae_decoder"].median_ms > 300 > found["unet"].median_ms
    assert measured.calls() == pytest.approx({"text_encoder": 2 / 3, "unet": 2 / 3, "vae_decoder": 1 / 3})
    assert all(ms > 300 / 3 for ms in measured.rounds_ms)
    (composed,), _ = pipeline_times(EAGER, demo_records, 7, True)
    said = " | ".join(with_measured(composed, measured).notes)
    assert "unet was called 0.666667 times per image, not 7" in said


def test_half_precision_gets_its_own_types() -> None:
    """fp16 in the places of networks: the pipeline's fp32 goes in and comes out."""
    (component,) = (c for c in source_from_text("demo").components if c.name == "unet")
    parts = {**demo_parts(), "unet": (component, EagerRunner(component, "fp16"), "fp16")}
    assert measure_pipeline(demo_folder(), parts, drawing(1), rounds=1).calls()["unet"] == 1


def test_where_there_is_no_pipeline_it_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="from end to end") as raised:
        measure_pipeline(tmp_path, demo_parts(), drawing())
    assert "the source is no pipeline of diffusers" in str(raised.value)
    two = Drawing(("a", "b"), (0, 1), 2, 3.0, 32, 32, batch=1)
    with pytest.raises(InputError, match="one batch"):
        measure_pipeline(demo_folder(), demo_parts(), two)


def test_on_another_device_stand_ins_are_hollow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here on a device that only has another name: one parameter tells where it is, no other is there."""
    component = demo_parts()["unet"][0]
    module = hollow(component.build(), "cpu:0")
    first, *rest = module.parameters()
    assert first.device.type == "cpu" and rest and all(p.is_meta for p in rest)
    measured = measure_pipeline(demo_folder(), demo_parts(), drawing(3), rounds=2, device="cpu:0")
    assert measured.calls() == {"text_encoder": 2, "unet": 3, "vae_decoder": 1}
