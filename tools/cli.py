"""The `optimize` command: words become typed values, one function is called, its result is printed.

Results go to stdout (`--json` for machines), progress and errors to stderr. Exit codes: 0 done, 1 a gate was not
passed, 2 the words or the input are wrong, 3 something is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimize.progress import Progress

PRECISIONS = ("fp32", "fp16", "bf16")


def parser() -> argparse.ArgumentParser:
    import optimize

    top = argparse.ArgumentParser(
        prog="optimize",
        description="Model components become ONNX and TensorRT artifacts that are proved right.",
        epilog="exit codes: 0 done, 1 a gate was not passed, 2 wrong words or input, 3 something is missing",
    )
    top.add_argument("--version", action="version", version=f"optimize {optimize.__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (text, words, run) in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=EPILOGS.get(name),
        )
        words(verb)
        verb.add_argument("--debug", action="store_true", help="show tracebacks")
        verb.set_defaults(run=run)
    return top


EPILOGS = {
    "export": """SOURCE is one of
  demo                        a small text-to-image pipeline with trained weights, in the package
  a folder or hub id          a diffusers pipeline or model, a transformers model
  arch:NAME[@tiny]            a public architecture with random weights (arch:sd15, arch:flux-dev@tiny, ...)
  python:module:factory       your own module: the factory returns a Component"""
}


def export_words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", metavar="SOURCE")
    verb.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the bundle: a new folder, or one to go on with"
    )
    verb.add_argument(
        "--component", action="append", default=[], metavar="NAME", help="only this component (repeat for more)"
    )
    verb.add_argument(
        "--precision",
        action="append",
        default=[],
        metavar="P",
        help="fp32 (default), fp16, bf16, int8 and other schemes of `optimize quantize`; repeat for more",
    )
    verb.add_argument(
        "--format",
        action="append",
        default=[],
        metavar="F",
        help="onnx (default), tensorrt, aoti (an AOTInductor package); repeat for more",
    )
    verb.add_argument(
        "--device",
        metavar="D",
        help="where --format aoti is to run: cpu, cuda or auto (default: the GPU, if there is one)",
    )
    verb.add_argument(
        "--axis", action="append", default=[], metavar="NAME=MIN:OPT:MAX", help="sizes of an axis; NAME=SIZE is static"
    )
    verb.add_argument("--opset", type=int, default=23, metavar="N", help="ONNX opset, 18 to 25 (default: 23)")
    verb.add_argument(
        "--kernels",
        action="store_true",
        help="attention, norms and gated activations as our own operators (domain ai.optimize) with standard bodies",
    )
    verb.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    verb.add_argument("--why", action="store_true", help="say for each artifact why it was made or kept")
    verb.add_argument("--allow-pickle", action="store_true", help="read pickled weights (reading one can run its code)")
    verb.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    verb.add_argument("--json", action="store_true")
    engine_words(verb)
    memory_words(verb)
    narrow_words(verb.add_argument_group("for fp16 and bf16"))
    calibration_words(verb.add_argument_group("for int8 and its like"))


def narrow_words(verb: argparse._ActionsContainer) -> None:
    verb.add_argument(
        "--keep-fp32",
        action="append",
        default=[],
        metavar="PATTERN",
        help="modules or nodes that stay in fp32 (mid_block*, */Softmax; repeat for more)",
    )
    verb.add_argument(
        "--probe-steps", type=int, metavar="N", help="forward passes on real data that find what overflows (default: 4)"
    )
    verb.add_argument("--no-probe", action="store_true", help="fp16 throughout, without a look at what overflows")


def engine_words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="GPU",
        help="engines for this GPU: rtx-4090, sm89, current; repeat for more (see `optimize targets`)",
    )
    verb.add_argument("--weight-streaming", action="store_true", help="engines that stream weights from host memory")
    verb.add_argument("--timing-cache", type=Path, metavar="FILE", help="TensorRT timing cache to use and update")


def memory_words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--memory",
        type=size_in_bytes,
        metavar="SIZE",
        help="memory that parity may count on (1.5GiB); larger models are proved in segments. Default: what is free",
    )


def size_in_bytes(text: str) -> int:
    from optimize.errors import InputError
    from optimize.profiles.wishes import bytes_from_text

    try:
        return bytes_from_text(text)
    except InputError as e:
        raise argparse.ArgumentTypeError(f"{e.what}; {e.expected}") from e


def bundle_words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("dir", type=Path, metavar="DIR", help="a bundle")
    verb.add_argument(
        "--component", action="append", default=[], metavar="NAME", help="only this component (repeat for more)"
    )
    verb.add_argument("--json", action="store_true")


def verify_words(verb: argparse.ArgumentParser) -> None:
    bundle_words(verb)
    verb.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that the bundle brings: Python that its source is, native code of AOTInductor packages",
    )
    memory_words(verb)


def build_words(verb: argparse.ArgumentParser) -> None:
    bundle_words(verb)
    verb.add_argument("--format", choices=["tensorrt"], default="tensorrt")
    verb.add_argument(
        "--precision", action="append", default=[], metavar="P", help="only from this precision (repeat for more)"
    )
    engine_words(verb)


def quantize_words(verb: argparse.ArgumentParser) -> None:
    bundle_words(verb)
    verb.add_argument(
        "--scheme", default="int8", metavar="S", help="int8 (default), int8-dynamic, int8-weight, fp8, int4-weight"
    )
    verb.add_argument(
        "--for",
        dest="runtime",
        metavar="RUNTIME",
        help="where Q and DQ go: onnxruntime or tensorrt (default: by scheme)",
    )
    verb.add_argument("--target", action="append", default=[], metavar="GPU", help="check that this GPU can run it")
    verb.add_argument(
        "--sensitivity", action="store_true", help="measure what each layer costs, even where the budget is met"
    )
    verb.add_argument("--dry-run", action="store_true", help="each layer with the precision it would get, and why")
    verb.add_argument("--trust-remote-code", action="store_true", help="run the Python code that the source is")
    calibration_words(verb)


def calibration_words(verb: argparse._ActionsContainer) -> None:
    verb.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="feeds to calibrate with: safetensors, npz, or a folder of them",
    )
    verb.add_argument("--samples", type=int, default=32, metavar="N", help="calibration samples (default: 32)")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples' noise (default: 0)")
    verb.add_argument(
        "--method", default="mse", metavar="M", help="scales by minmax, percentile, entropy, mse (default)"
    )
    verb.add_argument("--keep-high", action="append", default=[], metavar="PATTERN", help="layers that stay (repeat)")
    verb.add_argument(
        "--block",
        type=int,
        metavar="N",
        help="weights that share a scale, for int8-weight and int4-weight (0: a channel)",
    )
    verb.add_argument("--no-smooth", action="store_true", help="leave out SmoothQuant")
    verb.add_argument("--no-outliers", action="store_true", help="quantize an input's largest channels like the others")
    verb.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="FIGURE>=N",
        help="cosine>=0.999 (default), psnr>=30, snr>=25: layers go back until it is met; repeat for more",
    )


def evaluate_words(verb: argparse.ArgumentParser) -> None:
    from optimize.tools import quality

    bundle_words(verb)
    quality.words(verb)


def profile_words(verb: argparse.ArgumentParser) -> None:
    from optimize.tools import profiling

    profiling.words(verb)


def record_words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", metavar="SOURCE", help="demo, or a folder or hub id of a diffusers pipeline")
    verb.add_argument("--out", required=True, type=Path, metavar="DIR", help="where a set per component is written")
    verb.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeat for more; default: our own")
    verb.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    verb.add_argument("--samples", type=int, default=32, metavar="N", help="at most, of each component (default: 32)")
    verb.add_argument("--seed", type=int, default=0, metavar="N")
    verb.add_argument(
        "--component", action="append", default=[], metavar="NAME", help="only this component (repeat for more)"
    )
    verb.add_argument("--axis", action="append", default=[], metavar="NAME=MIN:OPT:MAX", help="sizes, as for export")
    verb.add_argument("--allow-pickle", action="store_true", help="read pickled weights (reading one can run its code)")
    verb.add_argument("--json", action="store_true")


def inspect_words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("path", type=Path, metavar="DIR|FILE", help="a bundle, or an ONNX file")
    verb.add_argument("--component", metavar="NAME")
    verb.add_argument("--precision", metavar="P", help="which artifact of the component")
    verb.add_argument("--fusions", action="store_true", help="each attention and norm: one node, or why not")
    verb.add_argument("--serve", action="store_true", help="open the graph in Netron")
    verb.add_argument("--port", type=int, default=0, metavar="N", help="port for --serve (default: a free one)")
    verb.add_argument(
        "--block", type=Path, metavar="FILE", help="write the block that repeats most as a graph of its own"
    )
    verb.add_argument("--json", action="store_true")


def target_words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--measure", action="store_true", help="also run copies and matrix products on this CPU, and on its GPU"
    )
    json_words(verb)


def json_words(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true")


# --- verbs -----------------------------------------------------------------------------------------------------------


def run_export(args: argparse.Namespace, progress: Progress) -> int:
    from optimize.exporting import export
    from optimize.tools import tables

    words = dict(
        components=args.component,
        precisions=args.precision or ["fp32"],
        formats=args.format or ["onnx"],
        targets=args.target,
        axes=args.axis,
        opset=args.opset,
        allow_pickle=args.allow_pickle,
        trust_remote_code=args.trust_remote_code,
        weight_streaming=args.weight_streaming,
        timing_cache=args.timing_cache,
        memory=args.memory,
        kernels=args.kernels,
        keep_fp32=args.keep_fp32,
        probe_steps=args.probe_steps,
        no_probe=args.no_probe,
        device=args.device,
        quantization=calibration_of(args),
    )
    if args.no_probe:
        print("optimize: --no-probe: nothing looks for what overflows in fp16 on other inputs", file=sys.stderr)
    if args.dry_run or args.why:
        with others_on_stderr():
            plan = export(args.source, args.out, dry_run=True, **words)
        if args.dry_run:
            tables.show(tables.plan_rows(plan), args.json, steps=tables.plan_steps(plan))
            return 0
        tables.show(tables.plan_rows(plan), False, stream=sys.stderr)
    with others_on_stderr():
        bundle = export(args.source, args.out, progress=progress, **words)
    tables.show(tables.bundle_rows(bundle), args.json)
    if not args.json:
        tables.show_receipts(bundle, bundle.manifest.artifacts, False)
    return 0


def run_build(args: argparse.Namespace, progress: Progress) -> int:
    from optimize.loading import build
    from optimize.tools import tables

    with others_on_stderr():
        bundle = build(
            args.dir,
            targets=args.target or ["current"],
            components=args.component,
            precisions=args.precision,
            weight_streaming=args.weight_streaming,
            timing_cache=args.timing_cache,
            progress=progress,
        )
    tables.show(tables.bundle_rows(bundle), args.json)
    return 0


def run_verify(args: argparse.Namespace, progress: Progress) -> int:
    from optimize.loading import verify
    from optimize.tools import tables

    with others_on_stderr():
        results = verify(
            args.dir,
            components=args.component,
            memory=args.memory,
            trust_remote_code=args.trust_remote_code,
            progress=progress,
        )
    tables.show([{"artifact": r.artifact, "state": r.state, "detail": r.detail} for r in results], args.json)
    failed = [r.artifact for r in results if r.state == "failed"]
    if failed:
        print(f"optimize: {len(failed)} of {len(results)} artifacts did not pass: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_quantize(args: argparse.Namespace, progress: Progress) -> int:
    from optimize.quantizing import artifact_id, plan, quantize, request_from_words
    from optimize.tools import tables

    words = dict(
        scheme=args.scheme,
        runtime=args.runtime,
        components=args.component,
        sensitivity=args.sensitivity,
        targets=args.target,
        trust_remote_code=args.trust_remote_code,
        **calibration_of(args),
    )
    if args.dry_run:
        tables.show(tables.layer_rows(plan(args.dir, **words)), args.json)
        return 0
    with others_on_stderr():
        result: Any = quantize(args.dir, progress=progress, **words)
    request = request_from_words(args.dir, **words)
    made = {artifact_id(request, name) for name in args.component or result.manifest.components}
    tables.show_receipts(result, made, args.json)
    return 0


def calibration_of(args: argparse.Namespace) -> dict[str, Any]:
    return dict(
        calibration=args.calibration,
        samples=args.samples,
        seed=args.seed,
        method=args.method,
        smooth=not args.no_smooth,
        outliers=not args.no_outliers,
        budgets=args.budget,
        keep=args.keep_high,
        block=args.block,
    )


def run_evaluate(args: argparse.Namespace, progress: Progress) -> int:
    from optimize.tools import quality

    with others_on_stderr():
        found = quality.measured(args, progress)
    return quality.report(found, args.json)


def run_profile(args: argparse.Namespace, progress: Progress) -> int:
    from optimize.tools import profiling

    with others_on_stderr():
        found = profiling.measured(args, progress)
    return profiling.show(found, args)


def run_record(args: argparse.Namespace, progress: Progress) -> int:
    from optimize.recording import prompts_from_file, record_source
    from optimize.tools import tables

    prompts = [*args.prompt, *(prompts_from_file(args.prompts) if args.prompts else [])]
    with others_on_stderr():
        made, never = record_source(
            args.source,
            args.out,
            prompts=prompts,
            samples=args.samples,
            seed=args.seed,
            components=args.component,
            axes=args.axis,
            allow_pickle=args.allow_pickle,
            progress=progress,
        )
    rows = [{"component": n, "samples": len(s), "folder": str(args.out / n), "how": s.how} for n, s in made.items()]
    rows += [{"component": n, "samples": 0, "folder": "", "how": f"not recorded: {why}"} for n, why in never.items()]
    tables.show(rows, args.json)
    return 0


def run_inspect(args: argparse.Namespace, progress: Progress) -> int:
    from optimize.tools import inspecting

    return inspecting.run(
        args.path,
        component=args.component,
        precision=args.precision,
        fusions=args.fusions,
        serve=args.serve,
        port=args.port,
        as_json=args.json,
        block=args.block,
    )


def run_targets(args: argparse.Namespace, progress: Progress) -> int:
    from optimize.tools import tables

    rows = tables.target_rows()
    if args.measure:
        rows += tables.measured_rows()
    tables.show(rows, args.json)
    return 0


def run_doctor(args: argparse.Namespace, progress: Progress) -> int:
    from optimize.tools import doctor, tables

    checks = doctor.doctor()
    tables.show([{"what": c.name, "works": c.ok, "detail": c.detail, "mend": c.mend} for c in checks], args.json)
    return 0


Verb = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace, "Progress"], int]]
VERBS: dict[str, Verb] = {
    "export": (
        "turn a source's components into proved ONNX, TensorRT and AOTInductor artifacts",
        export_words,
        run_export,
    ),
    "build": ("build engines from ONNX that a bundle already has", build_words, run_build),
    "verify": ("prove a bundle again: digests, and parity against its source", verify_words, run_verify),
    "quantize": (
        "artifacts of fewer bits from those that a bundle has: int8, fp8, int4, each with a receipt",
        quantize_words,
        run_quantize,
    ),
    "evaluate": (
        "how near a bundle's artifacts are to its fp32: per network, per timestep, and image by image",
        evaluate_words,
        run_evaluate,
    ),
    "profile": (
        "which backend and precision to deploy for each component: measured latency, quality, memory, and an answer",
        profile_words,
        run_profile,
    ),
    "record": (
        "run a pipeline and keep what flows into its networks: data for --calibration",
        record_words,
        run_record,
    ),
    "inspect": (
        "what is in a graph: operators, sizes, precisions, fusions; --serve opens Netron",
        inspect_words,
        run_inspect,
    ),
    "targets": ("the GPUs that are known, with their figures and sources", target_words, run_targets),
    "doctor": ("which backends work here, and why the others do not", json_words, run_doctor),
}


def quiet() -> None:
    """Third parties' chatter off stderr: what they have to say of our work, we say."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("torch.onnx", "torch.export", "optimum", "transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def others_on_stderr() -> Iterator[None]:
    """stdout is for results: what a factory, a model's own code or a library prints meanwhile goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of the command; gives the exit code."""
    args = parser().parse_args(words)
    from optimize.errors import OptimizeError
    from optimize.progress import Progress

    quiet()
    failure: BaseException
    try:
        code = int(args.run(args, Progress()))
        sys.stdout.flush()
        return code
    except OptimizeError as e:
        failure, text, code = e, str(e), e.exit_code
    except KeyboardInterrupt as e:
        failure, code = e, 130
        text = "interrupted; what was finished is kept, and the same command goes on from there"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:  # not one that we saw coming, but the machine's and not ours: a disk, a device, a limit
        failure, text, code = e, f"the system refused: {type(e).__name__}: {e}\n  mend: --debug shows where", 3
        with contextlib.suppress(OSError):  # what stdout still holds cannot be written either, if that is what failed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as e:
        failure, code = e, 70
        text = (
            f"a bug of ours, or a case that we did not foresee: {type(e).__name__}: {str(e)[:500]}\n"
            "  mend: run it again with --debug and report the text"
        )
    if args.debug:
        traceback.print_exception(failure)
    print(f"optimize: {text}", file=sys.stderr)
    return code


def exit_with_main() -> Any:
    sys.exit(main())


if __name__ == "__main__":
    exit_with_main()
