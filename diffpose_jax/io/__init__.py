"""Files, pictures and optional libraries."""
