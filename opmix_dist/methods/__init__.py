"""Training methods: what a run changes in its batches, its loss or its gradients."""
