"""Search spaces, as declarations only."""
