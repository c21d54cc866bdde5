"""The server half as a service on Ray Serve, and a camera in front of it."""
