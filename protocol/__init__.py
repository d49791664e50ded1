"""What the parts of a run say to each other: messages, roles, weights, tokens, metric names."""
