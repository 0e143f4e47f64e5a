"""A stream by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gammaopt._errors import check_knobs, one_of
from gammaopt.online.streams._base import Stream
from gammaopt.online.streams._digits import Digits
from gammaopt.online.streams._hermite import Hermite
from gammaopt.online.streams._parity import Parity
from gammaopt.online.streams._photos import Photos
from gammaopt.online.streams._staircase import Staircase
from gammaopt.online.streams._teacher import Teacher

STREAMS: dict[str, Callable[..., Stream]] = {
    "digits": Digits,
    "hermite": Hermite,
    "parity": Parity,
    "photos": Photos,
    "staircase": Staircase,
    "teacher": Teacher,
}


def build_stream(name: str, **knobs: Any) -> Stream:
    """The stream called ``name``, with its knobs: ``build_stream("parity", bits=20, degree=3)``.

    Raises:
        UsageError: for an unknown name, or a knob that the stream does not take.
        MissingExtraError: if a package that the stream needs is not installed.

    Example:
        >>> build_stream("staircase", bits=8, terms=2).name
        'staircase-8-2'
    """
    made = STREAMS[one_of("stream", name, STREAMS)]
    check_knobs(f"stream {name!r}", made, knobs)
    return made(**knobs)
