"""Tasks: prompts whose replies are scored, and error rates with what their number of examples allows."""
