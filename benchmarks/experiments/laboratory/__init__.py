"""The laboratory: a tiny language world in which the learner's own code runs in one process, for experiments."""
