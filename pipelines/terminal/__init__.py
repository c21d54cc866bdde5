"""Shows the progress of a command and redirects the output of libraries."""
