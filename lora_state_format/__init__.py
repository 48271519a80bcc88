"""Optimizer state keyed by parameter name, in safetensors."""
