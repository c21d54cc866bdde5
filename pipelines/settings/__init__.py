"""The config of an experiment: its sections, how it is read, the kinds of arms."""
