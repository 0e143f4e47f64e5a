"""Streams of fresh samples: stateless, so that resuming and pairing runs cost nothing.

``batch(seed, step)`` always gives the same samples, whatever was asked before; two runs with the same seed see the
same batches, and no sample is ever repeated within a seed.
"""

from gammaopt.online.streams._base import Batches as Batches
from gammaopt.online.streams._base import Split as Split
from gammaopt.online.streams._base import Stream as Stream
from gammaopt.online.streams._digits import Digits as Digits
from gammaopt.online.streams._staircase import Staircase as Staircase

__all__ = ["Batches", "Digits", "Split", "Staircase", "Stream"]
