"""Parts of benchmarks/gpu_engines.py: what is measured, against what, how, and the table."""
