"""Base shapes: the network that rates were tuned on, given as a module, a mapping of shapes, or a ``mup`` file.

A module may stand on the meta device: only its shapes are read. A ``.bsh`` file is what ``mup.save_base_shapes``
writes: parameter name → base shape, as YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gammaopt._errors import UsageError, require
from gammaopt._plan import Base
from gammaopt._roles import Role, rules_for

BaseShapes = nn.Module | Mapping[str, Any] | str | Path


def base_of(net: nn.Module, base: BaseShapes, readout: str | None, overrides: Mapping[str, Role] | None) -> Base:
    """The base network's rules, by the parameter names of ``net``.

    Raises:
        UsageError: if names or numbers of dimensions differ, or ``net`` has no readout, or the file can't be read.
    """
    shapes = _shapes(base)
    parameters = dict(net.named_parameters())
    for name in [*parameters, *shapes]:
        if name not in shapes or name not in parameters:
            where, lacks = ("net", "base") if name in parameters else ("base", "net")
            raise UsageError(
                f"parameter {name!r} of {where} is not in {lacks}; base must be the same network, other widths"
            )
        if len(shapes[name]) != parameters[name].dim():
            raise UsageError(
                f"parameter {name!r} is {tuple(parameters[name].shape)} in net and {shapes[name]} in base; "
                "base must be the same network, other widths"
            )
    sizes = {
        name: tuple(mine if size is None else size for size, mine in zip(shape, parameters[name].shape, strict=True))
        for name, shape in shapes.items()
    }
    rules = {rule.name: rule for rule in rules_for(net, readout, overrides=overrides, shapes=sizes)}
    widths = [rule.fan_in for rule in rules.values() if rule.role == "readout weight" and rule.fan_in]
    if not widths:
        raise UsageError(f"{type(net).__name__} has no Linear or Conv readout to scale; wrap without base=")
    return Base(rules, widths[0])


def _shapes(base: BaseShapes) -> dict[str, tuple[int | None, ...]]:
    """Shapes by parameter name; ``None``, in a ``mup`` file, for a size that does not change with width."""
    if isinstance(base, nn.Module):
        return {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    if isinstance(base, Mapping):
        return {name: _sizes(name, shape) for name, shape in base.items()}
    if not isinstance(base, (str, Path)):
        raise UsageError(
            f"base is a {type(base).__name__}; give a torch.nn.Module, a mapping of parameter names to shapes, "
            "or the path of a .bsh file"
        )
    path = Path(base)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _not_base_shapes(path) from None
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"base shapes {str(path)!r} can't be read ({reason}); give the path of a .bsh file") from None
    yaml = require("yaml", "mup")
    try:
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # 2001-99-99 is no date
        raise _not_base_shapes(path) from None
    if not isinstance(loaded, dict) or not all(isinstance(shape, list) for shape in loaded.values()):
        raise _not_base_shapes(path)
    return {str(name): _sizes(name, shape) for name, shape in loaded.items()}


def _sizes(name: object, shape: Any) -> tuple[int | None, ...]:
    """The shape of one parameter, or of anything that has one."""
    given = getattr(shape, "shape", shape)
    if not isinstance(given, (tuple, list)) or not all(size is None or _is_size(size) for size in given):
        raise UsageError(f"base shape of {name!r} is {given!r}; give a tuple of integers >= 1")
    return tuple(None if size is None else int(size) for size in given)


def _is_size(size: Any) -> bool:
    return not isinstance(size, bool) and hasattr(size, "__index__") and int(size) >= 1


def _not_base_shapes(path: Path) -> UsageError:
    return UsageError(f"{path} is not a file of base shapes; make one with mup.make_base_shapes")
