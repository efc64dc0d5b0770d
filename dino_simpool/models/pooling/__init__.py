"""Poolings: many tokens in, one feature out."""
