"""Plans the stages of an experiment, gives each a key, and runs them."""
