"""The studies are scripts in a folder, not a package."""

import sys
from pathlib import Path

STUDIES = Path(__file__).parents[2] / "studies"
sys.path.insert(0, str(STUDIES))
