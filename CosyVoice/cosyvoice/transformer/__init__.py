"""Encoders with relative positions, shared by the language model and the flow."""
