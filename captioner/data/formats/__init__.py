"""The image formats: what their headers say, and how each is read."""
