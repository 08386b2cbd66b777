"""Scores captions against references."""
