"""What other software writes, as bytes and as trees: the ground that the converters stand on. No framework is imported.

- Bytes: ``zips``, ``pickles`` (read, nothing run), ``torch_save`` (written), ``flax`` (msgpack), ``dcp`` (folders of
  ``torch.distributed.checkpoint``), ``plain`` (safetensors without a manifest), ``folders`` (anything of many files).
- Trees: ``state_dict`` (torch, ids), ``keyed`` (torch, names), ``optax`` and ``optax_nodes``, ``trees`` (any values).
- Values: ``quantised`` (codes of blocks), ``powers`` (steps counted by powers of betas).
"""
