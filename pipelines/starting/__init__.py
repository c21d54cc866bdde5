"""`mantis init`: from a folder of images to a config that runs as it stands."""
