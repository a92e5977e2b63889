"""Transformers models: loading, and reading activations at the sites of their blocks."""
