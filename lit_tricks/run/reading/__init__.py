"""Read run folders. Damaged parts are noted, not raised."""
