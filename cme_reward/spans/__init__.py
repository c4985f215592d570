"""Token ids <-> text, exactly."""
