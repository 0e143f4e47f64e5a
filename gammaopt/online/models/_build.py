"""A network by its name: ours, and every one of timm's and torchvision's as ``timm:NAME`` and ``torchvision:NAME``.

Nothing is downloaded: networks of other packages start from their own random initialisation.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from gammaopt._errors import UsageError, at_least, check_knobs, require
from gammaopt.online.models._plain import CNN, MLP
from gammaopt.online.models._resnet import ResNet18
from gammaopt.online.models._vit import ViT

MODELS: dict[str, type[nn.Module]] = {"mlp": MLP, "cnn": CNN, "resnet18": ResNet18, "vit": ViT}


def build_model(name: str, shape: tuple[int, ...], classes: int, **knobs: Any) -> nn.Module:
    """A fresh network for inputs of ``shape`` with an output for each class.

    Args:
        name: ``"mlp"``, ``"cnn"``, ``"resnet18"``, ``"vit"``, or ``"timm:NAME"`` or ``"torchvision:NAME"`` for the
            network that package knows as NAME, without its pretrained weights.
        shape: of one input; (channels, height, width) for all but ``"mlp"``.
        classes: number of outputs; one for a regression stream, which has 0 classes.
        knobs: ``width``, ``depth`` and what else the network takes.

    Raises:
        UsageError: for an unknown name, or a knob that the network does not take.
        MissingExtraError: if timm or torchvision is not installed.

    Example:
        >>> net = build_model("resnet18", (3, 32, 32), 10, width=16)
        >>> net.readout
        Linear(in_features=128, out_features=10, bias=True)
    """
    outputs = at_least("classes", classes, 0) or 1
    package, colon, inner = name.partition(":")
    if colon:
        makers = {"timm": _timm, "torchvision": _torchvision}
        if package not in makers:
            raise UsageError(f"unknown package {package!r} in model {name!r}; give timm:NAME or torchvision:NAME")
        return makers[package](inner, shape, outputs, knobs)
    if name not in MODELS:
        raise UsageError(
            f"unknown model {name!r}; choose one of: {', '.join(MODELS)}, or give timm:NAME or torchvision:NAME"
        )
    made = MODELS[name]
    check_knobs(f"model {name!r}", made, knobs, given=2)
    if made is not MLP:
        _check_images(name, shape)
    return made(math.prod(shape) if made is MLP else tuple(shape), outputs, **knobs)


def _check_images(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise UsageError(f"model {name!r} takes images, not inputs of shape {tuple(shape)}; give 'mlp'")


def _unknown(package: str, name: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, 3)
    fix = f"did you mean {' or '.join(near)}?" if near else f"{package} lists {len(known)} names"
    return UsageError(f"{package} has no model {name!r}; {fix}")


def _timm(name: str, shape: tuple[int, ...], outputs: int, knobs: dict[str, Any]) -> nn.Module:
    timm = require("timm", "vision")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    _check_images(f"timm:{name}", shape)
    settings = {"num_classes": outputs, "in_chans": shape[0], **knobs}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:  # a transformer's positions: else made for its own images
        settings.setdefault("img_size", tuple(shape[1:]))
    return _made(f"timm:{name}", lambda: timm.create_model(name, pretrained=False, **settings), settings)


def _torchvision(name: str, shape: tuple[int, ...], outputs: int, knobs: dict[str, Any]) -> nn.Module:
    models = require("torchvision", "vision").models
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    _check_images(f"torchvision:{name}", shape)
    if shape[0] != 3:
        raise UsageError(f"model 'torchvision:{name}' takes 3 channels, not {shape[0]}; timm's take any number")
    settings = {"num_classes": outputs, **knobs}
    if name.startswith("vit_"):
        settings.setdefault("image_size", shape[1])
    if name in ("googlenet", "inception_v3"):
        settings = {"aux_logits": False, "init_weights": False, **settings}
    return _made(f"torchvision:{name}", lambda: models.get_model(name, weights=None, **settings), settings)


def _made(name: str, make: Callable[[], nn.Module], settings: dict[str, Any]) -> nn.Module:
    try:
        return make()
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        told = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise UsageError(f"model {name!r} can't be made with {told}: {reason}") from error
