"""Is the simulation true? Full training on mixtures that a search simulated, and how the two compare."""
