"""Figures: of a study and its one-file HTML report, of a phase portrait, and one for each diagnostic."""

from gammaopt.report._diagnostics import draw_agreement as draw_agreement
from gammaopt.report._diagnostics import draw_alignment as draw_alignment
from gammaopt.report._diagnostics import draw_collapse as draw_collapse
from gammaopt.report._diagnostics import draw_density as draw_density
from gammaopt.report._diagnostics import draw_dynamics as draw_dynamics
from gammaopt.report._diagnostics import draw_edge as draw_edge
from gammaopt.report._diagnostics import draw_monitor as draw_monitor
from gammaopt.report._diagnostics import draw_ntk as draw_ntk
from gammaopt.report._diagnostics import draw_spectrum as draw_spectrum
from gammaopt.report._figures import gamma_curve as gamma_curve
from gammaopt.report._figures import gamma_curve_on as gamma_curve_on
from gammaopt.report._figures import loss_curves as loss_curves
from gammaopt.report._figures import plane as plane
from gammaopt.report._html import html_report as html_report
from gammaopt.report._portrait import ExponentRow as ExponentRow
from gammaopt.report._portrait import draw_portrait as draw_portrait
from gammaopt.report._portrait import exponents as exponents

__all__ = [
    "ExponentRow",
    "draw_agreement",
    "draw_alignment",
    "draw_collapse",
    "draw_density",
    "draw_dynamics",
    "draw_edge",
    "draw_monitor",
    "draw_ntk",
    "draw_portrait",
    "draw_spectrum",
    "exponents",
    "gamma_curve",
    "gamma_curve_on",
    "html_report",
    "loss_curves",
    "plane",
]
