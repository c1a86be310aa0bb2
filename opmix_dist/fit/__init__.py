"""Laws and a mixture from tables of runs that somebody already has: ratios, and losses."""
