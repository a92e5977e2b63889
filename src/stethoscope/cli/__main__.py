"""``python -m stethoscope.cli`` is ``stethoscope``."""

from stethoscope.cli import main

main()
