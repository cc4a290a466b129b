"""The language model, its layers and its token mixers."""
