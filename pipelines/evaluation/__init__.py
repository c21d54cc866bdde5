"""Measures every arm over the evaluation split."""
