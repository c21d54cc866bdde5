"""Figures of merit, from answers and curves."""
