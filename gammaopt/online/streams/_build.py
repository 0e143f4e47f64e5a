"""A stream by its name: ``build_stream("parity", bits=20)``, ``build_stream("cifar5m", path="/data/cifar5m")``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from gammaopt._errors import UsageError, check_knobs, one_of
from gammaopt.online.streams._base import Stream
from gammaopt.online.streams._digits import Digits
from gammaopt.online.streams._hermite import Hermite
from gammaopt.online.streams._parity import Parity
from gammaopt.online.streams._photos import Photos
from gammaopt.online.streams._staircase import Staircase
from gammaopt.online.streams._stored import cifar5m, imagefolder, mnist1m
from gammaopt.online.streams._teacher import Teacher
from gammaopt.online.streams._user import cifar10, mnist

STREAMS: dict[str, Callable[..., Stream]] = {
    "cifar10": cifar10,
    "cifar5m": cifar5m,
    "digits": Digits,
    "hermite": Hermite,
    "imagefolder": imagefolder,
    "mnist": mnist,
    "mnist1m": mnist1m,
    "parity": Parity,
    "photos": Photos,
    "staircase": Staircase,
    "teacher": Teacher,
}


def build_stream(name: str, **knobs: Any) -> Stream:
    """The stream called ``name``, with its knobs: ``build_stream("parity", bits=20, degree=3)``.

    Its ``shape`` is that of one input and its ``classes`` what the network must tell apart: images keep theirs,
    (1, 12, 12) for ``"digits"`` and (3, 32, 32) for ``"photos"``, and bits are vectors.

    Raises:
        UsageError: for an unknown name, a knob that the stream does not take, or files that are not as they should be.
        MissingExtraError: if a package that the stream needs is not installed.

    Example:
        >>> build_stream("staircase", bits=8, terms=2).name
        'staircase-8-2'
        >>> digits = build_stream("digits")
        >>> digits.shape, digits.classes
        ((1, 12, 12), 10)
    """
    made = STREAMS[one_of("stream", name, STREAMS)]
    check_knobs(f"stream {name!r}", made, knobs)
    for parameter in inspect.signature(made).parameters.values():
        if parameter.default is parameter.empty and parameter.name not in knobs:
            raise UsageError(f"stream {name!r} reads files; say where they are: {parameter.name}=FOLDER")
    return made(**knobs)
