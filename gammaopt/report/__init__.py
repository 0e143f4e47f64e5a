"""Figures and the one-file HTML report of a study."""

from gammaopt.report._figures import gamma_curve as gamma_curve
from gammaopt.report._figures import gamma_curve_on as gamma_curve_on
from gammaopt.report._figures import loss_curves as loss_curves
from gammaopt.report._figures import plane as plane
from gammaopt.report._html import html_report as html_report

__all__ = ["gamma_curve", "gamma_curve_on", "html_report", "loss_curves", "plane"]
