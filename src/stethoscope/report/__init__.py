"""Saved results -> one HTML file that opens with no network; reads artefacts only, and no model library.

render_report(Path("runs/demo"))   # writes runs/demo/report.html
"""

from stethoscope.report.render import render_report

__all__ = ["render_report"]
