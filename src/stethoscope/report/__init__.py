"""Saved results -> one HTML file that opens with no network; reads artefacts only, and no model library.

render_report(Path("runs/demo"))                               # writes runs/demo/report.html
layer_profile(diagnosis, selection).save("layer_profile.svg")  # the same picture, for a paper or a README
"""

from stethoscope.report.charts import layer_profile
from stethoscope.report.render import render_report
from stethoscope.report.trade import trade_off

__all__ = ["layer_profile", "render_report", "trade_off"]
