"""Declares search spaces. Holds no code that samples them."""
