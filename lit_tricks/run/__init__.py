"""A run: what is recorded while it trains, and what is read and reported afterwards."""
