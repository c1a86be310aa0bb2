"""Random faults in real jobs, and whether these end as if nothing had been. See docs/faults.md."""
