"""A run while it is under way, for a person who watches: reads the run directory and nothing else."""
