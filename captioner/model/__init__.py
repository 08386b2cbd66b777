"""Models: bytes of images in, captions out."""
