"""What a client does around its networks, without torch: the same on a camera as in a study."""
