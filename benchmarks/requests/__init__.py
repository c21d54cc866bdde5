"""The study of what a codec saves when its server asks: bytes and accuracy of every arm."""
