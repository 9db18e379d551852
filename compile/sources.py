"""What the user names becomes components: `demo`, a folder, a hub id, `arch:NAME[@tiny]`, `python:module:factory`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from optimize.errors import InputError, MissingError, OptimizeError

from .adapters import ADAPTERS, Adapter, adapters_for
from .architectures import ARCHITECTURES, PIPELINES, Architecture
from .digests import digest_of_file
from .spec import Axis, Component
from .trace import with_forward
from .weights import MemoryWeights, RandomWeights, SafetensorsWeights, Weights

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS_NAMES = ("diffusion_pytorch_model", "pytorch_model", "model")
"""What save_pretrained calls weights; other files of these types hold optimizers, arguments, schedules."""
NO_NETWORKS = ("SafetyChecker", "Scheduler", "Tokenizer", "TokenizerFast", "Processor", "Extractor")
"""Parts of a pipeline that are not exported, by how their classes' names end."""


@dataclass(frozen=True)
class Trust:
    """What the user allowed beyond plain data."""

    allow_pickle: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Source:
    """A resolved source: its words, its components in pipeline order, its folder where it has one."""

    text: str
    components: tuple[Component, ...]
    folder: Path | None = None


def source_from_text(text: str, trust: Trust = Trust(), wanted: Sequence[str] = ()) -> Source:
    """Resolves SOURCE. Of a pipeline whose parts are not all served, those that the names `wanted` ask for suffice.

    Raises InputError for what is unknown or broken, MissingError for what cannot be fetched.
    """
    kind, _, rest = text.partition(":")
    if kind == "arch" and rest:
        return Source(text, tuple(components_of_architecture(rest)))
    if kind == "python" and rest:
        return Source(text, components_of_factory(rest))
    folder = demo_folder() if text == "demo" else Path(text) if is_local(text) else folder_of_hub(text)
    if not folder.is_dir():
        raise InputError(
            "the source is a file",
            got=text,
            expected="a folder that save_pretrained wrote",
            mend="name the folder that holds model_index.json or config.json",
        )
    return Source(text, tuple(components_of_folder(folder, trust, wanted)), folder)


def is_local(text: str) -> bool:
    """Whether SOURCE names something on this machine's disk."""
    if not text or text == "demo" or text.startswith(("arch:", "python:")):
        return False
    try:
        return Path(text).exists()
    except OSError:  # longer than a path can be
        return False


def demo_folder() -> Path:
    import optimize

    return Path(optimize.__file__).parent / "demo"


# --- architectures with random weights -------------------------------------------------------------------------------


def components_of_architecture(name: str) -> Iterator[Component]:
    plain, _, size = name.partition("@")
    parts = PIPELINES.get(plain) or ({plain: plain} if plain in ARCHITECTURES else None)
    if parts is None or size not in ("", "tiny"):
        raise InputError(
            f"unknown architecture {name}",
            expected="one of " + ", ".join(sorted({*PIPELINES, *ARCHITECTURES})),
            mend="arch:NAME for full size, arch:NAME@tiny for a small one of the same shape",
        )
    configs = {part: config_of(ARCHITECTURES[key], size == "tiny") for part, key in parts.items()}
    facts = pipeline_facts(configs)
    for part, key in parts.items():
        architecture = ARCHITECTURES[key]
        config = {**full_config(architecture.library, architecture.class_name, configs[part]), **facts}
        default = plain.replace("-", "_") if len(parts) == 1 else part
        make = partial(make_module, architecture.library, architecture.class_name, configs[part])
        yield from components_of_network(default, architecture.class_name, config, make, RandomWeights())


def config_of(architecture: Architecture, tiny: bool) -> dict[str, Any]:
    return {**architecture.config, **(architecture.tiny if tiny else {})}


def pipeline_facts(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a component has to know of its pipeline: how many pixels a latent is."""
    blocks = configs.get("vae", {}).get("block_out_channels")
    return {"vae_scale_factor": 2 ** (len(blocks) - 1)} if blocks and len(configs) > 1 else {}


def full_config(library: str, class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the class's own defaults filled in."""
    cls = class_of(library, class_name)
    if library == "transformers":
        return dict(cls.config_class(**config).to_dict())
    import inspect

    defaults = {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items() if p.default is not p.empty}
    return {**defaults, **config}


def class_of(library: str, class_name: str) -> Any:
    if library == "optimize":
        from . import stylegan

        return getattr(stylegan, class_name)
    found = getattr(importlib.import_module(library), class_name, None)
    if found is None:
        raise InputError(
            f"{library} has no class {class_name}",
            got=f"{library} {version_of(library)}",
            expected="a class of the installed version",
            mend=f"update {library}, or check the config",
        )
    return found


def version_of(library: str) -> str:
    return str(getattr(importlib.import_module(library), "__version__", "of an unknown version"))


def make_module(library: str, class_name: str, config: Mapping[str, Any]) -> Any:
    cls = class_of(library, class_name)
    if library == "transformers":
        settings = cls.config_class(**config)
        settings._attn_implementation = "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"
        return cls(settings)
    return cls.from_config(dict(config)) if hasattr(cls, "from_config") else cls(**config)


def components_of_network(
    name: str,
    class_name: str,
    config: Mapping[str, Any],
    make: Callable[[], Any],
    weights: Weights,
    task: str | None = None,
) -> Iterator[Component]:
    """One component for each adapter of the class (two for a VAE)."""
    for adapter in adapters_for(class_name, task):
        with config_errors(class_name):
            io = adapter.io(config)
            axes = {a.name: replace(a, limit=limit_of(a, adapter.role, config)) for a in io.axes}
        yield Component(
            name=name + adapter.suffix,
            role=adapter.role,
            class_name=class_name,
            axes=axes,
            inputs=io.inputs,
            outputs=io.outputs,
            build=partial(build_on_meta, make, adapter, class_name),
            weights=weights,
            config=config,
        )


def limit_of(axis: Axis, role: str, config: Mapping[str, Any]) -> int | None:
    """The most that an axis can be, whatever is asked for: a text's positions lie in a table of that length."""
    if axis.name != "tokens" or "max_position_embeddings" not in config:
        return None
    return max(axis.max, int(config["max_position_embeddings"])) if role == "lm" else axis.max


@contextlib.contextmanager
def config_errors(class_name: str) -> Iterator[None]:
    """Whatever a library says of a config that it cannot use is about the user's config."""
    try:
        yield
    except (OptimizeError, MemoryError):
        raise
    except Exception as e:
        said = " ".join(str(e).split())
        raise InputError(
            f"{class_name} cannot be made from its config",
            got=f"{type(e).__name__}: {said[:300]}",
            expected="a config.json as save_pretrained wrote it, for the installed version",
            mend="fetch config.json again, or update diffusers and transformers",
        ) from e


def build_on_meta(make: Callable[[], Any], adapter: Adapter, class_name: str) -> Any:
    """The module with its parameters on meta, and with real buffers where they are in no checkpoint.

    Those are computed when the module is made, which can cost gigabytes: so only where there are any.
    """
    import torch
    from accelerate import init_empty_weights

    with torch.device("meta"), config_errors(class_name):
        module = make()
    if {name for name, _ in module.named_buffers()} - set(module.state_dict()):
        with init_empty_weights(include_buffers=False):
            module = make()
    return with_forward(module, adapter.forward)


# --- folders ---------------------------------------------------------------------------------------------------------


def components_of_folder(folder: Path, trust: Trust, wanted: Sequence[str] = ()) -> Iterator[Component]:
    if (folder / "model_index.json").exists():
        yield from components_of_pipeline(folder, trust, wanted)
    elif (folder / "config.json").exists():
        name = (
            folder.name if folder.name in ("unet", "vae", "transformer", "text_encoder", "text_encoder_2") else "model"
        )
        yield from components_of_model(folder, read_json(folder / "config.json"), name, {}, trust)
    else:
        names = sorted(p.name for p in folder.iterdir())
        raise InputError(
            f"{folder} holds no model",
            got=", ".join(names[:6]) or "nothing",
            expected="model_index.json (a diffusers pipeline) or config.json (a model)",
            mend="name the folder that save_pretrained wrote",
        )


def components_of_pipeline(folder: Path, trust: Trust, wanted: Sequence[str]) -> Iterator[Component]:
    parts = networks_of_pipeline(folder)
    if not parts:
        raise InputError(
            f"the pipeline in {folder} has no network with a config",
            got="model_index.json without one",
            expected="unet/config.json and the like",
            mend="download the folder again",
        )
    configs = {part: read_json(path) for part in parts if (path := folder / part / "config.json").exists()}
    facts = pipeline_facts(configs)
    for part, (library, class_name) in parts.items():
        try:
            check_part(folder, part, library, class_name)
            yield from list(components_of_model(folder / part, configs[part], part, facts, trust))
        except InputError as e:
            if wanted and not any(name == part or name.startswith(f"{part}_") for name in wanted):
                continue  # nobody asked for this one
            raise InputError(f"{part}: {e.what}", got=e.got, expected=e.expected, mend=e.mend) from e


def networks_of_pipeline(folder: Path) -> dict[str, tuple[str, str]]:
    """Part -> (library, class) of what model_index.json calls a network: no scheduler, tokenizer or safety checker."""
    found = {}
    for part, entry in read_json(folder / "model_index.json").items():
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            continue
        library, class_name = entry
        if Path(part).name != part or class_name.endswith(NO_NETWORKS):
            continue
        if class_name in ADAPTERS or (folder / part / "config.json").exists():
            found[part] = (library, class_name)
    return found


def check_part(folder: Path, part: str, library: str, class_name: str) -> None:
    """Raises InputError for a network of a pipeline whose code or config is not there."""
    if library not in ("diffusers", "transformers"):
        raise InputError(
            f"{class_name} comes from Python code of the model's own",
            got=f"{library}.{class_name}",
            expected="a class of diffusers or transformers",
            mend="write a factory that returns a Component and export python:package.module:factory",
        )
    if not (folder / part / "config.json").exists():
        raise InputError(
            f"{class_name} stands in model_index.json and has no config",
            got=f"no {part}/config.json",
            expected="each network that the pipeline names",
            mend="download the folder again",
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(
            f"{path} is not readable JSON", got=str(e), expected="a JSON object", mend="fetch the file again"
        ) from e
    if not isinstance(content, dict):
        raise InputError(
            f"{path} is not a config", got=type(content).__name__, expected="a JSON object", mend="fetch the file again"
        )
    return content


def components_of_model(
    folder: Path, config: dict[str, Any], name: str, facts: Mapping[str, Any], trust: Trust
) -> Iterator[Component]:
    if "_class_name" in config:
        class_name, task = str(config["_class_name"]), None
        plain = {k: v for k, v in config.items() if not k.startswith("_")}
        with config_errors(class_name):
            full = {**full_config("diffusers", class_name, plain), **facts}
        make = partial(make_module, "diffusers", class_name, plain)
    elif "model_type" in config:
        class_name, task, make, full = transformers_model(folder, config, trust)
    else:
        raise InputError(
            f"{folder / 'config.json'} names no class",
            got=", ".join(list(config)[:6]) or "nothing in it",
            expected="_class_name (diffusers) or model_type (transformers)",
            mend="fetch the file again",
        )
    adapters_for(class_name, task)  # an unserved class is said before anything about its files
    weights = weights_of_folder(folder, trust)
    yield from components_of_network(name, class_name, full, make, weights, task)


def transformers_model(
    folder: Path, config: dict[str, Any], trust: Trust
) -> tuple[str, str | None, Any, dict[str, Any]]:
    """Class, task, factory and config of a transformers folder."""
    if config.get("auto_map") and not trust.trust_remote_code:
        raise InputError(
            f"{folder} brings Python code of its own",
            got=config["auto_map"],
            expected="a class that transformers has",
            mend="--trust-remote-code runs that code with your rights: read it first",
        )
    from transformers import AutoConfig

    with config_errors("the transformers model"):
        settings = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust.trust_remote_code, local_files_only=True
        )
    cls = transformers_class(folder, config, settings, trust)
    full = dict(settings.to_dict())
    headed = cls.__name__.startswith(settings.__class__.__name__[:-6]) and "For" in cls.__name__
    full["task_output"] = "logits" if headed else None
    if config.get("auto_map"):
        full["code"] = {p.name: digest_of_file(p) for p in sorted(folder.glob("*.py"))}
    return cls.__name__, task_of(cls), partial(make_transformers, cls, settings), full


def transformers_class(folder: Path, config: Mapping[str, Any], settings: Any, trust: Trust) -> Any:
    """The class that the config names, else the bare model of its type; of the folder's own code if that is trusted."""
    import transformers

    names = config.get("architectures") or []
    name = str(names[0]) if isinstance(names, list) and names else str(names or "")
    auto_map = config.get("auto_map") or {}
    own = {str(ref).rpartition(".")[2]: str(ref) for ref in auto_map.values()} if isinstance(auto_map, dict) else {}
    if hasattr(transformers, name or " "):
        return getattr(transformers, name)
    with config_errors(name or "the model"):
        if trust.trust_remote_code and name in own:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(own[name], str(folder))
        if not name:
            return transformers.MODEL_MAPPING[type(settings)]
    raise InputError(
        f"transformers has no class {name}",
        got=f"architectures in {folder / 'config.json'}",
        expected="a class of the installed transformers",
        mend="update transformers, or check the config",
    )


def make_transformers(cls: Any, settings: Any) -> Any:
    settings._attn_implementation = "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"
    return cls._from_config(settings) if hasattr(cls, "_from_config") else cls(settings)


def task_of(cls: Any) -> str | None:
    """optimum's name for what the class does, or None where it cannot tell. A bare model gives features."""
    from optimum.exporters.tasks import TasksManager

    try:
        return str(TasksManager.infer_task_from_model(cls))
    except (ValueError, KeyError):
        return None if "For" in cls.__name__ else "feature-extraction"


def weights_of_folder(folder: Path, trust: Trust) -> Weights:
    """The folder's safetensors files (all shards of one set, the full-precision set first), else its pickled ones."""
    if files := weight_files(folder, (".safetensors",)):
        return SafetensorsWeights(files)
    pickled = weight_files(folder, PICKLED)
    if not pickled:
        raise InputError(
            f"{folder} has no weights",
            got=", ".join(sorted(p.name for p in folder.iterdir())[:6]),
            expected="a .safetensors file beside config.json",
            mend="download the folder with its weights",
        )
    if not trust.allow_pickle:
        raise InputError(
            f"the weights in {folder} are pickled",
            got=pickled[0].name,
            expected="safetensors",
            mend="a pickle can run code when it is read: convert it with save_pretrained("
            "safe_serialization=True), or pass --allow-pickle if you trust it",
        )
    return MemoryWeights(partial(load_pickled, pickled))


def weight_files(folder: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """The files of one set of weights: that without a variant (fp16, ema) first, a sharded set before a single file.

    Raises InputError for a broken index and for shards that are missing.
    """
    patterns = [*(f"*{s}.index*.json" for s in suffixes), *(f"*{s}" for s in suffixes)]
    found = sorted({p for pattern in patterns for p in folder.glob(pattern)}, key=preference)
    if not found:
        return ()
    if not found[0].name.endswith(".json"):
        return (found[0],)
    weight_map = read_json(found[0]).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names or any(Path(n).name != n for n in names):
        raise InputError(
            f"{found[0]} lists no weight files of this folder",
            got=", ".join(names[:3]) or "no weight_map",
            expected="the names of the files beside it",
            mend="download it again",
        )
    lost = [n for n in names if not (folder / n).exists()]
    if lost:
        raise InputError(
            f"{len(lost)} of {len(names)} weight files are missing in {folder}",
            got=", ".join(lost[:3]),
            expected=f"all that {found[0].name} lists",
            mend="download them again",
        )
    return tuple(folder / n for n in names)


def preference(path: Path) -> tuple[bool, bool, bool, bool, str]:
    """Sorts the weights of a folder: known names, no variant, full precision, an index before the files it lists."""
    stem, _, rest = path.name.partition(".")
    variants = set(rest.split(".")) - {"safetensors", "index", "json", *(s[1:] for s in PICKLED)}
    shard = re.search(r"-\d{5}-of-\d{5}", path.name) is not None
    return (
        not stem.startswith(WEIGHTS_NAMES),
        bool(variants) or shard,
        "fp16" in rest or "bf16" in rest,
        not path.name.endswith(".json"),
        path.name,
    )


def load_pickled(paths: tuple[Path, ...]) -> Mapping[str, Any]:
    """The tensors of pickled files. torch unpickles tensors and plain containers only: other objects are refused."""
    import torch

    state: dict[str, Any] = {}
    for path in paths:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as e:  # torch, pickle and zipfile raise many kinds; each means that this is no plain state dict
            raise InputError(
                f"{path.name} cannot be read as a state dict of tensors",
                got=first_sentence(str(e)) or type(e).__name__,
                expected="tensors by name; objects of other classes could run code and are refused",
                mend="convert it with save_pretrained(safe_serialization=True) where you trust it",
            ) from e
        loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
        tensors = {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)} if isinstance(loaded, dict) else {}
        if not tensors:
            raise InputError(
                f"{path.name} holds no tensors by name",
                got=type(loaded).__name__,
                expected="a state dict",
                mend="convert it with save_pretrained(safe_serialization=True)",
            )
        state.update(tensors)
    return state


def first_sentence(text: str) -> str:
    """What torch says of a file that it refused, without its advice to read it all the same."""
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation", "(1)", "(2)")
    lines = [line for part in text.splitlines() if (line := part.strip()) and not line.startswith(advice)]
    return lines[0].removeprefix("WeightsUnpickler error: ").partition(" Please use")[0][:300] if lines else ""


# --- hub ids and Python factories ------------------------------------------------------------------------------------


def folder_of_hub(text: str) -> Path:
    """A hub id's snapshot: from the local cache if it is whole, else downloaded (weights as safetensors, configs)."""
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise InputError(
            f"unknown source {text}",
            expected="demo, a folder, a hub id such as org/name, arch:NAME[@tiny], or python:package.module:factory",
            mend="check the path; `optimize export --help` lists the forms",
        )
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns, folder = ["*.json", "*.safetensors", "*.txt", "*.model"], None
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(hub.snapshot_download(text, allow_patterns=patterns, local_files_only=True))
            if is_whole(folder):
                return folder
        try:
            return Path(hub.snapshot_download(text, allow_patterns=patterns))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
            if folder is None:
                raise
            return folder  # what is there says what it lacks
    except HFValidationError as e:
        raise InputError(
            f"{text} is neither a folder nor a hub id",
            got=str(e),
            expected="a folder, or org/name",
            mend="check the path; `optimize export --help` lists the forms",
        ) from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise MissingError(
            f"{text} is not a folder here, not in the hub cache, and could not be downloaded",
            got=str(e).splitlines()[0][:300],
            expected="a folder, or a hub id that can be reached",
            mend="check the name and the connection, or name a local folder",
        ) from e


def is_whole(folder: Path) -> bool:
    """Whether each network in a snapshot has its weights: other programs leave its configs alone."""
    try:
        configs = [
            p for p in folder.rglob("config.json") if p.parent == folder or (folder / "model_index.json").exists()
        ]
        return bool(configs) and all(weight_files(p.parent, (".safetensors",)) for p in configs)
    except InputError:  # a shard is not there
        return False


def components_of_factory(rest: str) -> tuple[Component, ...]:
    """`package.module:factory`; the factory returns a Component or several."""
    module_name, _, factory_name = rest.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
        factory = getattr(module, factory_name)
    except Exception as e:  # the module is the user's: importing it can raise anything
        raise InputError(
            f"python:{rest} was not found",
            got=f"{type(e).__name__}: {e}",
            expected="python:package.module:factory",
            mend="the module has to be importable from here",
        ) from e
    try:
        made = factory()
    except OptimizeError:
        raise
    except Exception as e:
        raise InputError(
            f"the factory {rest} failed",
            got=f"{type(e).__name__}: {str(e)[:400]}",
            expected="a function with no arguments that returns a Component",
            mend=f'python -c "import {module_name} as m; m.{factory_name}()" shows where',
        ) from e
    components = (made,) if isinstance(made, Component) else tuple(made) if isinstance(made, list | tuple) else ()
    if not components or not all(isinstance(c, Component) for c in components):
        raise InputError(
            f"{factory_name} returned no Component",
            got=type(made).__name__,
            expected="one, or a list of them",
            mend="return optimize.Component.from_module(...)",
        )
    try:
        code = inspect.getsource(module)  # what a forward calls may stand beside its class
    except (OSError, TypeError):
        code = ""
    return tuple(
        replace(c, config={**c.config, "factory": hashlib.sha256(code.encode()).hexdigest()}) for c in components
    )
