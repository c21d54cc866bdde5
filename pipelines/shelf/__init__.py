"""What lies below a storage root, who needs it, and what may go."""
