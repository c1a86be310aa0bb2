"""The stages of a model's life, each a run of its own: pretraining, midtraining, instruction tuning."""
