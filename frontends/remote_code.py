"""Import the modeling code in a checkpoint from where it is, with consent only, and remove it from Python afterwards.

Nothing is copied to a module cache and nothing is downloaded. Each import makes a new package, so that two checkpoints
whose files have the same names do not get into each other's way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.options import MODEL_TYPES
from passopt.frontends.stock_errors import stock_errors
from passopt.ir.errors import ModelError

_packages = itertools.count()

#: Packages of GPU kernels that some code imports without need: its evaluation on a CPU does not call them.
_ACCELERATORS = ("flash_attn", "xformers")


@dataclasses.dataclass(frozen=True)
class StockClasses:
    """The checkpoint's own classes: `model` is a PreTrainedModel with a language head.

    `config` is a PretrainedConfig; None if the checkpoint brings none, and `model` takes transformers' own.
    """

    config: Any
    model: Any


@contextlib.contextmanager
def stock_classes(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Iterator[StockClasses]:
    """Yield the classes that config.json's auto_map names; they can be imported within the block.

    Raises:
        ModelError: If the checkpoint names no classes, if they are elsewhere, without consent, or if an import fails.
    """
    known = checkpoint.config.get("model_type") in MODEL_TYPES
    config = None if known and named_class(checkpoint, "AutoConfig") is None else _reference(checkpoint, "AutoConfig")
    model = _reference(checkpoint, "AutoModelForCausalLM")
    check_consent(checkpoint, trust_remote_code=trust_remote_code)
    with _package(checkpoint) as package:
        loaded = None if config is None else _load(checkpoint, package, config)
        yield StockClasses(loaded, _load(checkpoint, package, model))


def named_class(checkpoint: Checkpoint, role: str = "AutoModelForCausalLM") -> str | None:
    """Return what the auto_map of config.json names for a role, such as `modeling_x.XForCausalLM`, or None."""
    found = (checkpoint.config.get("auto_map") or {}).get(role)
    names: list[str | None] = found if isinstance(found, list) else [found]
    return next((name for name in names if name), None)


def check_consent(checkpoint: Checkpoint, *, trust_remote_code: bool) -> None:
    """Raise ModelError, naming the files, unless the user lets Python files of the checkpoint run on this machine."""
    if not trust_remote_code:
        files = ", ".join(sorted(path.name for path in checkpoint.directory.glob("*.py")))
        raise ModelError(
            f"{checkpoint.directory}: the model is defined by Python files of the checkpoint ({files}), which would "
            f"run on this machine. Read them, then pass `trust_remote_code=True`."
        )


def build_stock(checkpoint: Checkpoint, classes: StockClasses, dtype: Any, overrides: Mapping[str, Any]) -> Any:
    """Build an instance from config.json, updated with `overrides`; its parameters have no data, but its tables do.

    Args:
        checkpoint: The checkpoint.
        classes: Its classes, of which `config` is not None.
        dtype: The torch dtype of the parameters.
        overrides: Values that replace those of config.json.

    Raises:
        ModelError: If the class cannot be built.
    """
    with stock_errors(checkpoint, f"{classes.model.__name__} cannot be built from config.json"):
        return instantiate(classes, classes.config.from_dict({**checkpoint.config, **overrides}), dtype)


def instantiate(classes: StockClasses, config: Any, dtype: Any, **arguments: Any) -> Any:
    """Return an instance of the checkpoint's class under the torch dtype `dtype`; its parameters have no data."""
    import torch
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            model = classes.model(config, **arguments)
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False)


def _reference(checkpoint: Checkpoint, role: str) -> tuple[str, str]:
    """Return the module and the class name that the auto_map gives for a role, such as "AutoConfig"."""
    name = named_class(checkpoint, role)
    if name is None:
        classes = ", ".join(checkpoint.config.get("architectures") or ["no class"])
        raise ModelError(
            f"{checkpoint.directory}: config.json names {classes} and no {role} in an auto_map. Export supports the "
            f"model types {', '.join(sorted(MODEL_TYPES))}, and Baichuan, which brings its own modeling code."
        )
    # In what was saved from a hub's repository, names are REPOSITORY--MODULE.CLASS, also with the files beside them.
    module, _, attribute = name.rpartition("--")[2].rpartition(".")
    if not module.isidentifier() or not (checkpoint.directory / f"{module}.py").is_file():
        raise ModelError(
            f"{checkpoint.directory}: auto_map names {name}, code that is not beside config.json. "
            f"Put its files there; passopt downloads nothing."
        )
    return module, attribute


@contextlib.contextmanager
def _package(checkpoint: Checkpoint) -> Iterator[str]:
    name = f"_passopt_remote_code_{next(_packages)}"
    package = types.ModuleType(name)
    package.__path__ = [str(checkpoint.directory)]
    # The directory belongs to the user: write no compiled files into it.
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules[name] = package
    importlib.invalidate_caches()
    try:
        yield name
    finally:
        sys.dont_write_bytecode = write_bytecode
        for module in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[module]


def _load(checkpoint: Checkpoint, package: str, reference: tuple[str, str]) -> Any:
    module, attribute = reference
    with stock_errors(checkpoint, f"{module}.py: importing {attribute} failed"):
        try:
            return getattr(importlib.import_module(f"{package}.{module}"), attribute)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in _ACCELERATORS:
                raise
        with _stand_ins():
            return getattr(importlib.import_module(f"{package}.{module}"), attribute)


class _Absent:
    """What a module that is not installed would hold: every use of it fails."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ModuleNotFoundError(f"No module for {self._name}, which is used here", name=self._name)

    def __getattr__(self, name: str) -> Any:
        return _Absent(f"{self._name}.{name}")()


class _StandIn(types.ModuleType):
    """A module that is not installed: it can be imported, and what it holds fails when it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find a stand-in for each module of the packages of GPU kernels."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        is_stand_in = name.partition(".")[0] in _ACCELERATORS
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_stand_in else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Let code import packages of GPU kernels that are not installed; stock code has them at hand for training only."""
    finder = _StandInFinder()
    sys.meta_path.append(finder)  # The last place: what is installed is found before.
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]
