"""What the user names becomes components: `demo`, a folder, a hub id, `arch:NAME[@tiny]`, `python:module:factory`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from optimize.errors import InputError, MissingError

from .adapters import Adapter, adapters_for
from .architectures import ARCHITECTURES, PIPELINES, Architecture
from .spec import Component
from .trace import with_forward
from .weights import MemoryWeights, RandomWeights, SafetensorsWeights, Weights

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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


def source_from_text(text: str, trust: Trust = Trust()) -> Source:
    """Resolves SOURCE. Raises InputError for what is unknown or broken, MissingError for what cannot be fetched."""
    kind, _, rest = text.partition(":")
    if kind == "arch" and rest:
        return Source(text, tuple(components_of_architecture(rest)))
    if kind == "python" and rest:
        return Source(text, components_of_factory(rest))
    folder = demo_folder() if text == "demo" else Path(text)
    if not folder.exists():
        folder = folder_of_hub(text)
    if not folder.is_dir():
        raise InputError("the source is a file", got=text, expected="a folder that save_pretrained wrote",
                         mend="name the folder that holds model_index.json or config.json")
    return Source(text, tuple(components_of_folder(folder, trust)), folder)


def demo_folder() -> Path:
    import optimize

    return Path(optimize.__file__).parent / "demo"


# --- architectures with random weights -------------------------------------------------------------------------------


def components_of_architecture(name: str) -> Iterator[Component]:
    plain, _, size = name.partition("@")
    parts = PIPELINES.get(plain) or ({plain: plain} if plain in ARCHITECTURES else None)
    if parts is None or size not in ("", "tiny"):
        raise InputError(f"unknown architecture {name}", expected="one of " + ", ".join(sorted({*PIPELINES, *ARCHITECTURES})),
                         mend="arch:NAME for full size, arch:NAME@tiny for a small one of the same shape")
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
        raise InputError(f"{library} has no class {class_name}", mend=f"update {library}, or check the config")
    return found


def make_module(library: str, class_name: str, config: Mapping[str, Any]) -> Any:
    cls = class_of(library, class_name)
    if library == "transformers":
        settings = cls.config_class(**config)
        settings._attn_implementation = "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"
        return cls(settings)
    return cls.from_config(dict(config)) if hasattr(cls, "from_config") else cls(**config)


def components_of_network(name: str, class_name: str, config: Mapping[str, Any], make: Callable[[], Any],
                          weights: Weights, task: str | None = None) -> Iterator[Component]:
    """One component for each adapter of the class (two for a VAE)."""
    for adapter in adapters_for(class_name, task):
        io = adapter.io(config)
        yield Component(
            name=name + adapter.suffix, role=adapter.role, class_name=class_name, axes={a.name: a for a in io.axes},
            inputs=io.inputs, outputs=io.outputs, build=partial(build_on_meta, make, adapter), weights=weights,
            config=config,
        )


def build_on_meta(make: Callable[[], Any], adapter: Adapter) -> Any:
    """The module with its parameters on meta, and with real buffers where they are in no checkpoint.

    Those are computed when the module is made, which can cost gigabytes: so only where there are any.
    """
    import torch
    from accelerate import init_empty_weights

    with torch.device("meta"):
        module = make()
    if {name for name, _ in module.named_buffers()} - set(module.state_dict()):
        with init_empty_weights(include_buffers=False):
            module = make()
    return with_forward(module, adapter.forward)


# --- folders ---------------------------------------------------------------------------------------------------------


def components_of_folder(folder: Path, trust: Trust) -> Iterator[Component]:
    if (folder / "model_index.json").exists():
        yield from components_of_pipeline(folder, trust)
    elif (folder / "config.json").exists():
        name = folder.name if folder.name in ("unet", "vae", "transformer", "text_encoder", "text_encoder_2") else "model"
        yield from components_of_model(folder, read_json(folder / "config.json"), name, {}, trust)
    else:
        raise InputError(f"{folder} holds no model", got=", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing",
                         expected="model_index.json (a diffusers pipeline) or config.json (a model)",
                         mend="name the folder that save_pretrained wrote")


def components_of_pipeline(folder: Path, trust: Trust) -> Iterator[Component]:
    index = read_json(folder / "model_index.json")
    parts = {part: entry for part, entry in index.items()
             if isinstance(entry, list) and (folder / part / "config.json").exists()}
    configs = {part: read_json(folder / part / "config.json") for part in parts}
    facts = pipeline_facts(configs)
    found = False
    for part, (library, class_name) in parts.items():
        if library not in ("diffusers", "transformers") or class_name.endswith("SafetyChecker"):
            continue
        found = True
        yield from components_of_model(folder / part, configs[part], part, facts, trust)
    if not found:
        raise InputError(f"the pipeline in {folder} has no network with a config", expected="unet/config.json and the like")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not readable JSON", got=str(e), mend="fetch the file again") from e
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a config", got=type(content).__name__, expected="a JSON object")
    return content


def components_of_model(folder: Path, config: dict[str, Any], name: str, facts: Mapping[str, Any],
                        trust: Trust) -> Iterator[Component]:
    if "_class_name" in config:
        class_name, task = config["_class_name"], None
        plain = {k: v for k, v in config.items() if not k.startswith("_")}
        full = {**full_config("diffusers", class_name, plain), **facts}
        make = partial(make_module, "diffusers", class_name, plain)
    elif "model_type" in config:
        class_name, task, make, full = transformers_model(folder, config, trust)
    else:
        raise InputError(f"{folder / 'config.json'} names no class", got=", ".join(list(config)[:6]),
                         expected="_class_name (diffusers) or model_type (transformers)")
    adapters_for(class_name, task)  # an unserved class is said before anything about its files
    weights = weights_of_folder(folder, trust)
    yield from components_of_network(name, class_name, full, make, weights, task)


def transformers_model(folder: Path, config: dict[str, Any], trust: Trust) -> tuple[str, str | None, Any, dict[str, Any]]:
    """Class, task and config of a transformers folder: the class its config names, else the one of its task."""
    if config.get("auto_map") and not trust.trust_remote_code:
        raise InputError(f"{folder} brings Python code of its own", got=config["auto_map"],
                         mend="--trust-remote-code runs that code with your rights: read it first")
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust.trust_remote_code, local_files_only=True)
    class_name = next(iter(config.get("architectures") or []), None)
    task = task_of(folder, class_name)
    if class_name is None or not hasattr(importlib.import_module("transformers"), class_name):
        from optimum.exporters.tasks import TasksManager

        class_name = TasksManager.get_model_class_for_task(task or "feature-extraction", model_type=settings.model_type).__name__
    full = dict(settings.to_dict())
    full["task_output"] = "logits" if class_name.startswith(settings.__class__.__name__[:-6]) and "For" in class_name else None
    return class_name, task, partial(make_transformers, class_name, settings), full


def make_transformers(class_name: str, settings: Any) -> Any:
    cls = class_of("transformers", class_name)
    settings._attn_implementation = "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"
    return cls._from_config(settings) if hasattr(cls, "_from_config") else cls(settings)


def task_of(folder: Path, class_name: str | None) -> str | None:
    """optimum's name for what the model does, or None where it cannot tell."""
    from optimum.exporters.tasks import TasksManager

    try:
        if class_name:
            return str(TasksManager.infer_task_from_model(class_of("transformers", class_name)))
        return str(TasksManager.infer_task_from_model(str(folder), library_name="transformers"))
    except (ValueError, KeyError, InputError):
        return None


def weights_of_folder(folder: Path, trust: Trust) -> Weights:
    """The folder's safetensors files (all shards of one set, the full-precision set first)."""
    for index in sorted(folder.glob("*.safetensors.index.json"), key=lambda p: (".fp16." in p.name, p.name)):
        names = sorted(set(read_json(index)["weight_map"].values()))
        lost = [n for n in names if not (folder / n).exists()]
        if lost:
            raise InputError(f"{len(lost)} of {len(names)} weight files are missing in {folder}", got=", ".join(lost[:3]),
                             mend="download them again")
        return SafetensorsWeights(tuple(folder / n for n in names))
    single = sorted(folder.glob("*.safetensors"), key=lambda p: (".fp16." in p.name, p.name))
    preferred = [p for p in single if p.name.startswith(("diffusion_pytorch_model", "model"))] or single
    if preferred:
        return SafetensorsWeights((preferred[0],))
    pickled = sorted(p for pattern in PICKLED for p in folder.glob(pattern))
    if not pickled:
        raise InputError(f"{folder} has no weights", expected="a .safetensors file beside config.json",
                         mend="download the folder with its weights")
    if not trust.allow_pickle:
        raise InputError(f"the weights in {folder} are pickled", got=pickled[0].name, expected="safetensors",
                         mend="a pickle can run code when it is read: convert it with save_pretrained("
                              "safe_serialization=True), or pass --allow-pickle if you trust it")
    return MemoryWeights(partial(load_pickled, tuple(pickled)))


def load_pickled(paths: tuple[Path, ...]) -> Mapping[str, Any]:
    import pickle

    import torch

    state: dict[str, Any] = {}
    for path in paths:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as e:
            raise InputError(f"{path.name} cannot be read as a state dict of tensors", got=str(e)[:300],
                             mend="convert it with save_pretrained(safe_serialization=True)") from e
        state.update(loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {})
    return state


# --- hub ids and Python factories ------------------------------------------------------------------------------------


def folder_of_hub(text: str) -> Path:
    """A hub id's snapshot: from the local cache if it is whole, else downloaded (weights as safetensors, configs)."""
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise InputError(f"unknown source {text}", expected="demo, a folder, a hub id such as org/name, arch:NAME[@tiny], "
                         "or python:package.module:factory", mend="check the path; `optimize export --help` lists the forms")
    import huggingface_hub as hub
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        try:
            return Path(hub.snapshot_download(text, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hub.snapshot_download(text, allow_patterns=patterns))
    except HFValidationError as e:
        raise InputError(f"{text} is neither a folder nor a hub id", got=str(e)) from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise MissingError(f"{text} is not a folder here, not in the hub cache, and could not be downloaded",
                           got=str(e).splitlines()[0][:300], mend="check the name and the connection, or name a local folder") from e


def components_of_factory(rest: str) -> tuple[Component, ...]:
    """`package.module:factory`; the factory returns a Component or several."""
    module_name, _, factory_name = rest.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError) as e:
        raise InputError(f"python:{rest} was not found", got=str(e), expected="python:package.module:factory",
                         mend="the module has to be importable from here") from e
    made = factory()
    components = (made,) if isinstance(made, Component) else tuple(made)
    if not components or not all(isinstance(c, Component) for c in components):
        raise InputError(f"{factory_name} returned no Component", got=type(made).__name__,
                         mend="return optimize.Component.from_module(...)")
    return components
