"""Looking at runs: does a network scale as planned, and in which regime does it train?"""

from gammaopt.diagnostics._agreement import Agreement as Agreement
from gammaopt.diagnostics._agreement import agreement as agreement
from gammaopt.diagnostics._agreement import agreements as agreements
from gammaopt.diagnostics._coordinates import CoordinateCheck as CoordinateCheck
from gammaopt.diagnostics._coordinates import LayerSlope as LayerSlope
from gammaopt.diagnostics._coordinates import coordinate_check as coordinate_check
from gammaopt.diagnostics._dynamics import Catapult as Catapult
from gammaopt.diagnostics._dynamics import Collapse as Collapse
from gammaopt.diagnostics._dynamics import Drop as Drop
from gammaopt.diagnostics._dynamics import Dynamics as Dynamics
from gammaopt.diagnostics._dynamics import collapse as collapse
from gammaopt.diagnostics._dynamics import dynamics as dynamics
from gammaopt.diagnostics._kernels import centred_kernel_alignment as centred_kernel_alignment
from gammaopt.diagnostics._kernels import feature_kernel as feature_kernel
from gammaopt.diagnostics._kernels import kernel_target_alignment as kernel_target_alignment
from gammaopt.diagnostics._kernels import ntk as ntk
from gammaopt.diagnostics._kernels import ntk_eigenvalues as ntk_eigenvalues
from gammaopt.diagnostics._monitor import Measurement as Measurement
from gammaopt.diagnostics._monitor import Monitor as Monitor
from gammaopt.diagnostics._operator import Curvature as Curvature
from gammaopt.diagnostics._portrait import Grid as Grid
from gammaopt.diagnostics._portrait import Portrait as Portrait
from gammaopt.diagnostics._portrait import portrait as portrait
from gammaopt.diagnostics._spectrum import Eigenvalues as Eigenvalues
from gammaopt.diagnostics._spectrum import SpectralDensity as SpectralDensity
from gammaopt.diagnostics._spectrum import Trace as Trace
from gammaopt.diagnostics._spectrum import hessian_eigenvalues as hessian_eigenvalues
from gammaopt.diagnostics._spectrum import hessian_trace as hessian_trace
from gammaopt.diagnostics._spectrum import sharpness as sharpness
from gammaopt.diagnostics._spectrum import spectral_density as spectral_density

__all__ = [
    "Agreement",
    "Catapult",
    "Collapse",
    "CoordinateCheck",
    "Curvature",
    "Drop",
    "Dynamics",
    "Eigenvalues",
    "Grid",
    "LayerSlope",
    "Measurement",
    "Monitor",
    "Portrait",
    "SpectralDensity",
    "Trace",
    "agreement",
    "agreements",
    "centred_kernel_alignment",
    "collapse",
    "coordinate_check",
    "dynamics",
    "feature_kernel",
    "hessian_eigenvalues",
    "hessian_trace",
    "kernel_target_alignment",
    "ntk",
    "ntk_eigenvalues",
    "portrait",
    "sharpness",
    "spectral_density",
]
