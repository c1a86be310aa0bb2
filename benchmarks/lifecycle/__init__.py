"""OP-Mix and what it is compared with, over the stages of a lifecycle and over seeds."""
