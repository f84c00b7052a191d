"""Data sets: motion capture, the detector simulator, TFDS builders and the input pipeline."""
