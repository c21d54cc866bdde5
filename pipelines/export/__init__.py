"""A trained client as files that need no torch."""
