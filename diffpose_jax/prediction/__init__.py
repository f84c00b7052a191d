"""From pictures to poses in files."""
