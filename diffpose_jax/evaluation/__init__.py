"""Metrics, baselines, calibration and the evaluation itself."""
