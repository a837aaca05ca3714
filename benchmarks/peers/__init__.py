"""Other quantizers beside ours, on the bundled pipeline: ``make bench-peers``."""
