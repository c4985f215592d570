"""Chat templates: what they write around messages, and how that is read back."""
