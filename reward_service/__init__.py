"""Scores: reward models, reward functions and the frozen reference, behind Ray workers."""
