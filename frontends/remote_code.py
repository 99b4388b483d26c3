"""Import the modeling code in a checkpoint from where it is, with consent only, and remove it from Python afterwards.

Nothing is copied to a module cache and nothing is downloaded. Each import makes a new package, so that two checkpoints
whose files have the same names do not get into each other's way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from passopt.frontends.checkpoint import Checkpoint
from passopt.frontends.options import MODEL_TYPES
from passopt.ir.errors import ModelError

_packages = itertools.count()


@dataclasses.dataclass(frozen=True)
class StockClasses:
    """The checkpoint's own classes: `config` is a PretrainedConfig, `model` a PreTrainedModel with a language head."""

    config: Any
    model: Any


@contextlib.contextmanager
def stock_classes(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Iterator[StockClasses]:
    """Yield the classes that config.json's auto_map names; they can be imported within the block.

    Raises:
        ModelError: If the checkpoint names no classes, if they are elsewhere, without consent, or if an import fails.
    """
    config, model = (_reference(checkpoint, role) for role in ("AutoConfig", "AutoModelForCausalLM"))
    check_consent(checkpoint, trust_remote_code=trust_remote_code)
    with _package(checkpoint) as package:
        yield StockClasses(_load(checkpoint, package, config), _load(checkpoint, package, model))


def check_consent(checkpoint: Checkpoint, *, trust_remote_code: bool) -> None:
    """Raise ModelError, naming the files, unless the user lets Python files of the checkpoint run on this machine."""
    if not trust_remote_code:
        files = ", ".join(sorted(path.name for path in checkpoint.directory.glob("*.py")))
        raise ModelError(
            f"{checkpoint.directory}: the model is defined by Python files of the checkpoint ({files}), which would "
            f"run on this machine. Read them, then pass --trust-remote-code."
        )


def build_stock(checkpoint: Checkpoint, classes: StockClasses, dtype: Any, overrides: Mapping[str, Any]) -> Any:
    """Build an instance from config.json, updated with `overrides`; its parameters have no data, but its tables do.

    Args:
        checkpoint: The checkpoint.
        classes: Its classes.
        dtype: The torch dtype of the parameters.
        overrides: Values that replace those of config.json.

    Raises:
        ModelError: If the class cannot be built.
    """
    import torch
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        config = classes.config.from_dict({**checkpoint.config, **overrides})
        with init_empty_weights(include_buffers=False):
            model = classes.model(config)
    except Exception as error:  # The checkpoint's code and configuration may raise any error.
        raise ModelError(
            f"{checkpoint.directory}: {classes.model.__name__} cannot be built from config.json: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False)


def _reference(checkpoint: Checkpoint, role: str) -> tuple[str, str]:
    """Return the module and the class name that the auto_map gives for a role, such as "AutoConfig"."""
    auto_map = checkpoint.config.get("auto_map")
    found = auto_map.get(role) if isinstance(auto_map, Mapping) else None
    name = found[0] if isinstance(found, list) and found else found
    if not isinstance(name, str):
        classes = ", ".join(checkpoint.config.get("architectures") or ["no class"])
        raise ModelError(
            f"{checkpoint.directory}: config.json names {classes} and no {role} in an auto_map. Export supports the "
            f"model types {', '.join(sorted(MODEL_TYPES))}, and Baichuan2, which brings its own modeling code."
        )
    module, _, attribute = name.rpartition(".")
    if "--" in name or not module.isidentifier():
        raise ModelError(
            f"{checkpoint.directory}: auto_map names {name}, code that is not beside config.json. "
            f"Put its files there and name it MODULE.CLASS; passopt downloads nothing."
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
    try:
        return getattr(importlib.import_module(f"{package}.{module}"), attribute)
    except Exception as error:  # The checkpoint's code may raise any error: tell the user in which file.
        raise ModelError(
            f"{checkpoint.directory / module}.py: importing {attribute} failed: {type(error).__name__}: {error}"
        ) from error
