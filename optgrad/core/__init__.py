"""What two or more families share: pure functions on pytrees, no method in it."""
