"""The commands of `mantis`, one file for each group."""
