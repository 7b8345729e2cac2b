"""What the families share, against slow explicit implementations."""
