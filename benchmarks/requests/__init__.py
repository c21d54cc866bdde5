"""What it is worth that the server asks: bytes and accuracy by request, of all rivals."""
