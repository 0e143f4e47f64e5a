"""Which part of a framework's model is the one to look at."""

from __future__ import annotations

from torch import nn

from gammaopt._wrapped import Wrapped


def the_model(module: nn.Module) -> nn.Module:
    """The one wrapped module in ``module``, or itself if there is none or there are several."""
    wrapped = [part for part in module.modules() if isinstance(part, Wrapped)]
    return wrapped[0] if len(wrapped) == 1 else module
