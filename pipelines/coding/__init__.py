"""Codes image files to streams and answers, as `mantis encode`, `decode` and `predict` do."""
