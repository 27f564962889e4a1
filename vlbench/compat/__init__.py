"""Everything that rests on private parts of a library, one function per touch point.

A module per library. Each docstring names the part of the library, the versions it was checked
with, and what breaks when it changes; `tests/test_compat.py` has a test for each of them. Nothing
here imports another room, and libraries are imported when a function needs them.
"""
