"""``python -m lora_state_format`` is ``lora-state``."""

from lora_state_format.cli import main

main()
