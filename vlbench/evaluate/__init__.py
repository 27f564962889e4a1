"""Evaluation: questions, answers, and what they add up to."""
