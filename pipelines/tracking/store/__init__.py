"""The MLflow store as a place: whether it answers, where it was moved, whose files it holds."""
