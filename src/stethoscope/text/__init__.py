"""Documents and tokens."""
