"""Building and loading causal LMs, joint LoRA layers, losses, and parameter and FLOP counts."""
