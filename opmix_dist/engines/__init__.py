"""One interface over the ways to train a model; the training loop names no engine."""
