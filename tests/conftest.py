"""Tests run beside other work: threads that wait must not spin (see `vlbench.__main__.fit`)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
