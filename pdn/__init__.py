"""pdn: pretraining for preconditioned linear-recurrence language models."""

__version__ = "0.1.0"
