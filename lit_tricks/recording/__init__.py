"""What a run leaves behind: its folder, what is measured on the way, and what W&B is told of it."""
