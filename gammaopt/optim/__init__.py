"""Torch's own optimizers, with per-parameter multipliers on the learning rate applied inside ``step()``."""

from gammaopt.optim._sgd import SGD as SGD

__all__ = ["SGD"]
