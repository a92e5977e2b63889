"""Draw the documentation's pictures from saved results: python docs/scripts/draw.py"""

import json
from pathlib import Path
from types import SimpleNamespace

from stethoscope.report.charts import energy_curves, validation_plane
from stethoscope.results.comparison import Comparison
from stethoscope.results.validation import ScoreValidation

ROOT = Path(__file__).parents[2]
RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures"
LAYERS, CHOSEN = 12, (4, 5, 8)
# Of the scores that were judged, those that the text speaks of: names of all would cover each other.
SHOWN = ("mass_shift", "lift increment", "top_separation", "attribution", "gradient", "injection")


def method() -> str:
    """The idea as a picture: layers, how much each differs, and where the change goes."""
    shares = (0.12, 0.2, 0.16, 0.3, 0.74, 0.8, 0.42, 0.36, 0.7, 0.4, 0.26, 0.18)
    parts = []
    columns = ((20, "base"), (430, "change: tuned minus base"), (620, "edited"))
    for x, name in columns:
        parts.append(f'<text x="{x}" y="24" class="h">{name}</text>')
    parts.append('<text x="170" y="24" class="h">how the layer\'s features differ</text>')
    parts.append('<text x="170" y="42">with the skill\'s text and without, beyond chance</text>')
    for i in range(LAYERS):
        y = 54 + 20 * (LAYERS - 1 - i)
        on = i in CHOSEN
        parts.append(f'<rect x="20" y="{y}" width="100" height="15" rx="3" class="base"/>')
        parts.append(
            f'<rect x="170" y="{y + 3}" width="{180 * shares[i]:.0f}" height="9" class="{"on" if on else "off"}"/>'
        )
        parts.append(f'<rect x="430" y="{y}" width="100" height="15" rx="3" class="{"on" if on else "tau"}"/>')
        parts.append(f'<rect x="620" y="{y}" width="100" height="15" rx="3" class="base"/>')
        if on:
            for start, end in ((178 + 180 * shares[i], 424), (536, 614)):
                parts.append(f'<path d="M{start:.0f} {y + 7.5}H{end}" class="arrow"/>')
            parts.append(f'<rect x="620" y="{y}" width="100" height="15" rx="3" class="on half"/>')
    parts.append(f'<text x="20" y="{54 + 20 * LAYERS + 14}">layer 0 at the bottom</text>')
    parts.append(f'<text x="620" y="{54 + 20 * LAYERS + 14}">same shape, same speed</text>')
    style = (
        "text{font:12px system-ui,sans-serif;fill:#5f6368}.h{font-weight:600;fill:#1b1c1e}.base{fill:#d7d9dc}"
        ".tau{fill:none;stroke:#b6babf;stroke-dasharray:3 2}.off{fill:#b6babf}.on{fill:#0072b2}.half{fill-opacity:.75}"
        ".arrow{stroke:#0072b2;stroke-width:1.5;fill:none;marker-end:url(#a)}"
    )
    head = '<marker id="a" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 320" width="800" height="320" role="img">'
        f'<style>{style}</style><defs>{head}<path d="M0 0L6 3L0 6z" fill="#0072b2"/></marker></defs>'
        f'<rect width="800" height="320" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Write every picture."""
    PICTURES.mkdir(exist_ok=True)
    demo = Comparison.load(RESULTS / "demo.json")
    validation = ScoreValidation.load(RESULTS)
    validation = validation.model_copy(update={"scores": {name: validation.scores[name] for name in SHOWN}})
    # only some of the geometry's fields are kept there
    text = (RESULTS / "scalpel.json").read_text(encoding="utf-8")
    scalpel = json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))
    demo.plot(without=["tuned"], width=600).save(PICTURES / "trade_off.svg")
    validation_plane(validation, 5, width=600).save(PICTURES / "validation.svg")
    energy_curves(scalpel.geometry, scalpel.selection, width=600).save(PICTURES / "energy.svg")
    (PICTURES / "method.svg").write_text(method(), encoding="utf-8")


if __name__ == "__main__":
    main()
