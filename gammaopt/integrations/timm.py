"""timm: after ``import gammaopt.integrations.timm`` its factory builds gammaopt's optimizers by name.

``create_optimizer_v2(model, opt="gammasgd")``, ``"gammamomentum"``, ``"gammaadam"`` or ``"gammaadamw"``, with timm's
own weight-decay and layer-decay groups: ``lr_scale`` in a group and the γ multiplier of a parameter simply multiply.
The names have no underscore: of ``"gamma_sgd"`` timm reads the last part only, and builds torch's SGD without a word.
``"gammamuon"`` (torch ≥ 2.9) takes matrices only, as torch's: give the factory a list of them, not the model.
As for timm's ``"sgd"``, momentum is 0.9 unless given, and with Nesterov in ``"gammasgd"`` but not ``"gammamomentum"``.
"""

from __future__ import annotations

import gammaopt.optim
from gammaopt._errors import require
from gammaopt.optim import SGD, Adam, AdamW

_timm = require("timm.optim", "vision")

# timm splits a name at "_", so ours have none.
NAMES = (
    "gammasgd",
    "gammamomentum",
    "gammaadam",
    "gammaadamw",
    *(["gammamuon"] if "Muon" in gammaopt.optim.__all__ else []),
)


def _register() -> None:
    from timm.optim._optim_factory import OptimInfo, default_registry

    about = "with learning rates that follow γ (gammaopt)"
    known = set(default_registry.list_optimizers())
    infos = [
        OptimInfo("gammasgd", SGD, f"SGD with Nesterov momentum, {about}", False, True, defaults={"nesterov": True}),
        OptimInfo(
            "gammamomentum", SGD, f"SGD with classical momentum, {about}", False, True, defaults={"nesterov": False}
        ),
        OptimInfo("gammaadam", Adam, f"Adam, {about}", has_betas=True),
        OptimInfo("gammaadamw", AdamW, f"AdamW, {about}", has_betas=True),
    ]
    if "Muon" in gammaopt.optim.__all__:
        infos.append(OptimInfo("gammamuon", gammaopt.optim.Muon, f"Muon of matrices, {about}", has_momentum=True))
    for info in infos:
        if info.name not in known:
            default_registry.register(info)


_register()
