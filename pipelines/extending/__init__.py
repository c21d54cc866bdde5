"""Tasks added to a trained codec: their plan and its stages."""
