"""Optimizer state in memory: frozen, framework-free, tensors as the places of their bytes.

``sources`` says where bytes come from, ``dtypes`` and ``tensors`` what they mean, ``states`` what an optimizer holds,
``digests`` how they are checked, ``text`` how names out of files are shown. The hub is ``states.OptimizerState``: every
reader makes one, every writer takes one.
"""
