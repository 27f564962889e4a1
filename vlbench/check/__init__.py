"""`python -m vlbench check`: the data of a recipe are checked before training."""
