"""Looking at runs: does a network scale as planned, and where in the (γ, η) plane does it train?"""

from gammaopt.diagnostics._coordinates import CoordinateCheck as CoordinateCheck
from gammaopt.diagnostics._coordinates import LayerSlope as LayerSlope
from gammaopt.diagnostics._coordinates import coordinate_check as coordinate_check
from gammaopt.diagnostics._portrait import Grid as Grid
from gammaopt.diagnostics._portrait import Portrait as Portrait
from gammaopt.diagnostics._portrait import portrait as portrait

__all__ = ["CoordinateCheck", "Grid", "LayerSlope", "Portrait", "coordinate_check", "portrait"]
