"""Other programs' formats: PyTorch weights, StableHLO."""
