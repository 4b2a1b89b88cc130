"""Probabilistic programs of medical images: the vocabulary that models are written in."""

__version__ = "0.1.0"
