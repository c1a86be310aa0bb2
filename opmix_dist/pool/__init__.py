"""The side pool: probe training, candidate evaluation, fit and proposal, and the pool's own loop."""
