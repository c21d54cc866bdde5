"""The rate-accuracy study: protocols, points and tables."""
