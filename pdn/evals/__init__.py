"""Evaluation of language models: during training and of finished checkpoints."""
