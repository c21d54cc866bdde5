"""Bytes on the wire. Never imports torch."""
