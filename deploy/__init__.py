"""Operating: the command line and the embedded demo model."""
