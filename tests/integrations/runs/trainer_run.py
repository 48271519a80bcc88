"""A LoRA run of transformers' Trainer that keeps its optimizer by name, and that can be killed while it saves.

``python trainer_run.py FOLDER [CALL [COUNT]]``: SIGKILL at the COUNT-th call of ``os.CALL`` once checkpoint-4 is being
written.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from lora_state_format.integrations.transformers import with_named_state


def build(targets: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 4, adapter: str = "default") -> Any:
    """The same model every time."""
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    )
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    torch.manual_seed(1)
    return get_peft_model(base, config, adapter_name=adapter)


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 64, (count, 12), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in tokens]


def make(folder: Path, model: Any = None, optimizers: Any = (None, None), **options: Any) -> Any:
    """A trainer for 6 steps that saves every second one."""
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "seed": 3,
        "use_cpu": True,
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        **{**defaults, **options},
    )
    dataset = rows()
    return Trainer(
        model=build() if model is None else model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset[:8],
        optimizers=optimizers,
    )


def kill_at(call: str, count: int) -> None:
    """Let the process die at the ``count``-th call of a function of ``os`` from now on."""
    real: Callable[..., Any] = getattr(os, call)
    left = count

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(os, call, counted)


def main(folder: str, call: str, count: str) -> None:
    trainer = make(Path(folder))
    save = trainer._save_optimizer_and_scheduler

    def armed(output_dir: str) -> None:
        if output_dir.endswith("checkpoint-4"):
            kill_at(call, int(count))
        save(output_dir)

    with_named_state(trainer, drop_legacy=True)
    save, trainer._save_optimizer_and_scheduler = trainer._save_optimizer_and_scheduler, armed
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
