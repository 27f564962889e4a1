"""`python -m vlbench check`: the data of a recipe, looked at before a cluster is paid for."""
