"""Optimizer state in memory: frozen, framework-free, tensors as the places of their bytes.

``sources`` says where bytes come from, ``tensors`` what they mean, ``states`` what an optimizer holds, ``digests`` how
they are checked. The hub is ``states.OptimizerState``: every reader makes one, every writer takes one.
"""
