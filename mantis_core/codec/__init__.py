"""The client half and the server half at work, the whole codec, and its folder."""
