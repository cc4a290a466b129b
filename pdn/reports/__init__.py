"""Figures and comparisons of finished runs."""
