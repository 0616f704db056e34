"""What the pass did, as data, as tables and as a page."""
