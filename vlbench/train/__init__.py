"""Training: the stages of a recipe, one Lightning fit each, and what survives an interruption."""
