"""Torch's own optimizers, with per-parameter multipliers on the learning rate applied inside ``step()``."""

import torch

from gammaopt.optim._adam import Adam as Adam
from gammaopt.optim._adam import AdamW as AdamW
from gammaopt.optim._param_groups import param_groups as param_groups
from gammaopt.optim._sgd import SGD as SGD

__all__ = ["SGD", "Adam", "AdamW", "param_groups"]

if hasattr(torch.optim, "Muon"):  # since torch 2.9
    from gammaopt.optim._muon import Muon as Muon

    __all__ += ["Muon"]
