"""Train language models that decide, while they train, what data to read next (OP-Mix, arXiv 2605.15220)."""

__version__ = "0.1.0"
