"""Imported by Python as it starts where this folder is in PYTHONPATH: encoders become shallow."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent.parent / "shallow_encoders.py"))["install_finder"]()
