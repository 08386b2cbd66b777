"""Scoring captions against references."""
