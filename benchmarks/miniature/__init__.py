"""The paper in miniature: label-free rewards compared in a world that a program can check."""
