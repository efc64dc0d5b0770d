"""Encoder in, arrays out: features, attention, neighbors."""
