"""Faults on purpose: named points in the code, and a plan of what happens at them. See docs/faults.md."""
