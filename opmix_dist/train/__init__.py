"""The training loop and what hangs on it: policies, callbacks, checkpoints, schedules."""
