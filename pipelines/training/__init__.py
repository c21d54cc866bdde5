"""The code that runs in a training worker."""
