"""Checkpoints that survive: writing, verifying, finding and loading them."""
