"""Modules: client and server side by side, and what they share."""
