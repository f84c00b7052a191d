"""Configurations, each a file with `get_config()`."""
