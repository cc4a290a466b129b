"""The training loop, and the configuration of a whole run."""
