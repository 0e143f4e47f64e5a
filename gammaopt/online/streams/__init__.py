"""Streams of fresh samples: stateless, so that resuming and pairing runs cost nothing.

``batch(seed, step)`` always gives the same samples, whatever was asked before; two runs with the same seed see the
same batches, and no sample is ever repeated within a seed.
"""

from gammaopt.online.streams._base import Batches as Batches
from gammaopt.online.streams._base import Split as Split
from gammaopt.online.streams._base import Stream as Stream
from gammaopt.online.streams._build import STREAMS as STREAMS
from gammaopt.online.streams._build import build_stream as build_stream
from gammaopt.online.streams._digits import Digits as Digits
from gammaopt.online.streams._hermite import Hermite as Hermite
from gammaopt.online.streams._parity import Parity as Parity
from gammaopt.online.streams._photos import Photos as Photos
from gammaopt.online.streams._staircase import Staircase as Staircase
from gammaopt.online.streams._teacher import Teacher as Teacher

__all__ = [
    "STREAMS",
    "Batches",
    "Digits",
    "Hermite",
    "Parity",
    "Photos",
    "Split",
    "Staircase",
    "Stream",
    "Teacher",
    "build_stream",
]
