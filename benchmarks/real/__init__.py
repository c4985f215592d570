"""Real pretrained language models, end to end."""
