"""Ready-made run configurations; the exact command stands in each header."""
