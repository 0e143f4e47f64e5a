"""Looking at a run: does it scale as planned?"""

from gammaopt.diagnostics._coordinates import CoordinateCheck as CoordinateCheck
from gammaopt.diagnostics._coordinates import LayerSlope as LayerSlope
from gammaopt.diagnostics._coordinates import coordinate_check as coordinate_check

__all__ = ["CoordinateCheck", "LayerSlope", "coordinate_check"]
