"""Inspects an output: reports, drawings, a gallery and a review page."""
