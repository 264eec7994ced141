"""Images that fit into memory: one tensor of uint8, and batches that are made at once, on the device of the images."""
