"""Find the class of ``--mm_projector_type``, a short name or ``package.module:ClassName``, and fit its arguments."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from llava_twophase.errors import UserError
from llava_twophase.projectors.names import SHIPPED
from llava_twophase.text import did_you_mean

_NOT_HASHED = frozenset(sys.stdlib_module_names) | {"torch"}


def find_class(kind: str, kwargs: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """Import the class of a projector type and compare its constructor with the arguments.

    Modules are found in the current folder first, as with ``python -m``.

    Args:
        kind: A key of ``SHIPPED``, or ``package.module:ClassName``.
        kwargs: ``--mm_projector_kwargs``.

    Raises:
        UserError: The module or the class is not found, it is not an ``nn.Module``, or the arguments do not fit.
    """
    flag = f"--mm_projector_type {kind}"
    if kind == "identity":
        raise UserError(f"{flag} has no weights, so stage 1 would have nothing to train; use linear or mlp2x_gelu")
    module_name, separator, class_name = SHIPPED.get(kind, kind).partition(":")
    if not (separator and module_name and class_name.isidentifier()):
        hint = did_you_mean(kind, ("linear", "mlp2x_gelu", *SHIPPED))
        raise UserError(
            f"{flag} is unknown; {f'{hint} Expected' if hint else 'expected'} linear, mlpNx_gelu such as mlp2x_gelu, "
            f"{', '.join(SHIPPED)}, or a class of your own as package.module:ClassName"
        )
    found = getattr(_import_module(module_name, flag), class_name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        what = f"has no {class_name}" if found is None else f"has a {class_name} that is not a subclass of nn.Module"
        raise UserError(f"{flag}: the module {module_name} {what}; expected an nn.Module class")
    try:
        inspect.signature(found).bind(1, 1, None, **kwargs)
    except TypeError as error:
        raise UserError(
            f"{flag}, --mm_projector_kwargs {json.dumps(dict(kwargs))}: {error}; the constructor is called with tower "
            f"width, LLM width, patch grid and these keywords, and takes {inspect.signature(found)}"
        ) from None
    return found


def _import_module(name: str, flag: str) -> Any:
    folder = os.getcwd()
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{flag}: {name} needs {error.name}, which is not installed") from None
        raise UserError(
            f"{flag}: there is no module {error.name}, neither in the current folder {folder} nor installed; run the "
            "command in the folder that has it, or add its folder to PYTHONPATH"
        ) from None
    except Exception as error:  # a user's file may raise anything
        raise UserError(f"{flag}: importing {name} failed: {describe_failure(error)}") from error


def describe_failure(error: Exception) -> str:
    """Return an error of a user's code with its type and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def source_digests(projector: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of each file that defines a class of a projector, by module name.

    Covers its submodules and all base classes, without torch's own; a function from another file is not covered.
    """
    classes = {base for part in projector.modules() for base in type(part).__mro__}
    names = {cls.__module__ for cls in classes if cls.__module__.partition(".")[0] not in _NOT_HASHED}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return {name: _digest(Path(file)) for name, file in sorted(files.items()) if file is not None}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
