"""A small language world in which RLHF visibly works on a laptop."""
