"""Imported by Python as it starts where this folder is in PYTHONPATH: towers become shallow."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent.parent / "shallow.py"))["install_finder"]()
