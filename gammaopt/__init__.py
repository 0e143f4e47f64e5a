"""gammaopt: tune the richness. Learning rates that follow the feature-learning strength γ.

    import gammaopt

    model = gammaopt.wrap(net, gamma=3.0, example_inputs=x)              # f = (h − h₀)/γ
    optimizer = gammaopt.SGD(model.parameters(), lr=0.1, momentum=0.9)   # lr is the rate tuned at γ = 1

Importing this package imports torch and numpy and nothing else, and those only when a name below is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gammaopt._errors import MissingExtraError as MissingExtraError
from gammaopt._errors import UsageError as UsageError
from gammaopt._errors import run_script as run_script
from gammaopt._laws import EtaLaw as EtaLaw

if TYPE_CHECKING:
    from gammaopt._depth import effective_depth as effective_depth
    from gammaopt._knee import knee as knee
    from gammaopt._plan import Plan as Plan
    from gammaopt._residual import Residual as Residual
    from gammaopt._wrap import fold as fold
    from gammaopt._wrap import unwrap as unwrap
    from gammaopt._wrap import wrap as wrap
    from gammaopt.optim import SGD as SGD
    from gammaopt.optim import Adam as Adam
    from gammaopt.optim import AdamW as AdamW
    from gammaopt.optim import Muon as Muon
    from gammaopt.optim import param_groups as param_groups

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "EtaLaw",
    "MissingExtraError",
    "Plan",
    "Residual",
    "UsageError",
    "effective_depth",
    "fold",
    "knee",
    "param_groups",
    "run_script",
    "unwrap",
    "wrap",
]

# Names that need torch, and where they live: importing torch takes seconds, and the command line's --help none.
_LAZY = {
    "SGD": "gammaopt.optim",
    "Adam": "gammaopt.optim",
    "AdamW": "gammaopt.optim",
    "Plan": "gammaopt._plan",
    "Residual": "gammaopt._residual",
    "fold": "gammaopt._wrap",
    "knee": "gammaopt._knee",
    "effective_depth": "gammaopt._depth",
    "param_groups": "gammaopt.optim",
    "unwrap": "gammaopt._wrap",
    "wrap": "gammaopt._wrap",
}


def _torch_has_muon() -> bool:
    """Whether this torch, which is not imported for that, is 2.9 or newer and has ``torch.optim.Muon``."""
    found = importlib.util.find_spec("torch")
    return bool(found and found.origin and (Path(found.origin).parent / "optim" / "_muon.py").exists())


if _torch_has_muon():
    __all__ += ["Muon"]
    _LAZY["Muon"] = "gammaopt.optim"

_ROOMS = ("diagnostics", "online", "optim", "report", "tuning")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"gammaopt.{name}")
    if name not in _LAZY:
        why = "; it needs torch >= 2.9, or use gammaopt.param_groups" if name == "Muon" else ""
        raise AttributeError(f"module 'gammaopt' has no attribute {name!r}{why}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
