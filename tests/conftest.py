"""Tests run beside other work: threads that wait must not spin (see `vlbench.__main__.fit`)."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")
