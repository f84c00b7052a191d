"""DiffPose, in the paper's order."""
