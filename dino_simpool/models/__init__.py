"""Encoders: a trunk of timm, a pooling, a norm; and the weights of other projects."""
