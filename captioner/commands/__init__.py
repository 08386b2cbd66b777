"""The commands: each parses its options, calls a function elsewhere, and prints."""
