"""Training loops of other frameworks that save and load their optimizers' state by name, with one line.

Each module is imported by its users alone: ``transformers`` (and TRL), ``accelerate``, ``lightning``. The state goes
into a folder of its own, ``training_state``, since what serves a model loads every ``.safetensors`` file beside it.
"""

from lora_state_format.format.rotation import STATE

__all__ = ["STATE"]
