"""The output directory: manifest, parts, attention maps."""
