"""Models in use: loading a run, generating from it."""
