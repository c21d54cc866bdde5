"""Starts Ray on this machine or joins a cluster, and checks its resources."""
