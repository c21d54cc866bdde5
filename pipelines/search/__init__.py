"""`mantis tune`: draws samples, trains trials, stops weak ones at rungs and reports the search."""
