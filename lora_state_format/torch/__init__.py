"""Save and load optimizer state by parameter name, in PyTorch. The only part of this package that imports torch."""

from lora_state_format.torch.apply import LoadReport, apply
from lora_state_format.torch.background import BackgroundSave
from lora_state_format.torch.capture import capture
from lora_state_format.torch.hooks import Following, follow_names
from lora_state_format.torch.load import load_optimizer, plan
from lora_state_format.torch.resize import resize_adapter
from lora_state_format.torch.save import save_optimizer
from lora_state_format.torch.schedules import load_scheduler

__all__ = [
    "BackgroundSave",
    "Following",
    "LoadReport",
    "apply",
    "capture",
    "follow_names",
    "load_optimizer",
    "load_scheduler",
    "plan",
    "resize_adapter",
    "save_optimizer",
]
