"""One module per engine that is measured; each runs in its own environment."""
