"""Experiments: each one command, with its figures and what they say in docs/experiments."""
