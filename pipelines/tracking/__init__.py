"""Logs runs to MLflow, finds them and registers models. No other folder imports MLflow."""
