"""Figures, the one-file HTML report of a study, and the picture of a phase portrait."""

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
    "draw_portrait",
    "exponents",
    "gamma_curve",
    "gamma_curve_on",
    "html_report",
    "loss_curves",
    "plane",
]
