"""Is a verifier good enough? How its rewards rank responses of which something is known."""
