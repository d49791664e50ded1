"""The labeling page: a small server on which people compare responses."""
