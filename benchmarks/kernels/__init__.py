"""Parts of benchmarks/gpu_kernels.py: how things are timed, what is measured, and the table."""
