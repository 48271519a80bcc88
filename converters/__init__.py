"""Converters: one foreign format, one module."""
