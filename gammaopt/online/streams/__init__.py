"""Streams of fresh samples: stateless, so that resuming and pairing runs cost nothing.

A batch of (seed, step) always has the same samples, whatever was asked before, so two runs with the same seed see the
same batches. Within a seed no stored sample comes twice; made ones are drawn independently, which comes to the same but
for vectors of few bits (``Parity``, ``Staircase``).
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
from gammaopt.online.streams._shard import Shard as Shard
from gammaopt.online.streams._staircase import Staircase as Staircase
from gammaopt.online.streams._stored import Stored as Stored
from gammaopt.online.streams._stored import cifar5m as cifar5m
from gammaopt.online.streams._stored import imagefolder as imagefolder
from gammaopt.online.streams._stored import mnist1m as mnist1m
from gammaopt.online.streams._teacher import Teacher as Teacher
from gammaopt.online.streams._user import FromDataset as FromDataset
from gammaopt.online.streams._user import FromIterable as FromIterable
from gammaopt.online.streams._user import cifar10 as cifar10
from gammaopt.online.streams._user import mnist as mnist

__all__ = [
    "STREAMS",
    "Batches",
    "Digits",
    "FromDataset",
    "FromIterable",
    "Hermite",
    "Parity",
    "Photos",
    "Shard",
    "Split",
    "Staircase",
    "Stored",
    "Stream",
    "Teacher",
    "build_stream",
    "cifar5m",
    "cifar10",
    "imagefolder",
    "mnist",
    "mnist1m",
]
