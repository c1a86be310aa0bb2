"""Starting runs: torchrun on one or several nodes, SLURM jobs that save, requeue and resume by themselves."""
