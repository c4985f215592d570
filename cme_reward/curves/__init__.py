"""What happened in a training run: its metrics as curves, and signs of what goes wrong."""
