"""Looking at an output: reports, drawings, a page."""
