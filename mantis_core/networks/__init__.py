"""Modules: client, server and teacher side by side, and what they share."""
