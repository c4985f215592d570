"""Pictures of token rewards."""
