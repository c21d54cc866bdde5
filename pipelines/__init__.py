"""The stage chain, its command line, tracking and registry: the only place that knows Ray Train."""
