"""The output directory: manifest, parts, attention maps, review decisions, exports."""
