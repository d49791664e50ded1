"""What a run is: frozen, strict sections that together make one RunConfig."""
