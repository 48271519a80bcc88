"""The main job on real input, told step by step: train, convert, rebuild with other groups, resume, compare."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

from lora_state_format.errors import TargetExistsError
from lora_state_format.operations.conversion import convert
from lora_state_format.torch import load_optimizer

__all__ = ["demonstrate"]

STEPS: Final = 4
MORE_STEPS: Final = 5
TARGETS: Final = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def demonstrate(say: Callable[[str], None], out: Path | None = None) -> bool:
    """Run the demo and say what happens.

    Args:
        say: Called with each line.
        out: A new folder to keep everything in; by default nothing is kept.

    Returns:
        Whether the resumed run equals the uninterrupted one.

    Raises:
        TargetExistsError: ``out`` exists and is not empty.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TargetExistsError(f"{out} exists and is not an empty folder; choose another one for the demo")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses much on a busy machine
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if out is None:
                return _demonstrate(say, Path(folder))
            out.mkdir(parents=True, exist_ok=True)
            exact = _demonstrate(say, out)
            say(f"Kept in {out}: look with `lora-state inspect {out / f'checkpoint-{STEPS}'}`")
            return exact
    finally:
        torch.set_num_threads(threads)


def _demonstrate(say: Callable[[str], None], folder: Path) -> bool:
    def show(lines: object) -> None:
        for line in str(lines).replace(f"{folder}/", "").split("\n"):
            say(f"   {line}")

    say("1. A tiny model of Qwen2's structure: 28 layers, LoRA on q, k, v, o, gate, up and down")
    model = get_peft_model(_base(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    total, trainable = sum(1 for _ in model.parameters()), len(_trainable(model))
    show(f"{total} parameters, {trainable} trainable, {total - trainable} frozen")

    say(f"2. transformers.Trainer trains it for {STEPS} steps and saves")
    trainer = _trained(model, folder)
    live = trainer.optimizer.optimizer  # accelerate wraps it
    model.config.save_pretrained(folder / "base")  # what `lora-state check --base` asks for
    checkpoint = folder / f"checkpoint-{STEPS}"
    first, second = (len(group["params"]) for group in live.param_groups)
    show(f"{checkpoint.name}/optimizer.pt: two groups, of {first} and {second} parameters, and no names")
    show("(lr is constant here; at the end of a schedule it is 0.0, and no further step would move a weight)")

    target = checkpoint / "training_state" / "optimizer.safetensors"
    say(f"3. lora-state convert {checkpoint.name} {target.relative_to(folder)}")
    target.parent.mkdir()
    show(convert(checkpoint, target))

    say("4. The model is rebuilt from its base and the checkpoint's adapter; AdamW gets one group: groups 2 -> 1")
    rebuilt, optimizer = _rebuilt(checkpoint)
    show(f"torch's own load_state_dict(): {_refusal(optimizer, checkpoint)}")

    say(f"5. load_optimizer(optimizer, model, '{target.relative_to(folder)}')")
    show(load_optimizer(optimizer, rebuilt, target))
    loaded = _compare(_slots(live, model), _slots(optimizer, rebuilt))
    show(f"next to the run that was not interrupted: {loaded} slots equal, by name")

    say(f"6. Both runs go on for {MORE_STEPS} steps on the same batches; a third one too, with no optimizer state")
    cold, empty = _rebuilt(checkpoint)
    _train_on(model, live)
    _train_on(rebuilt, optimizer)
    _train_on(cold, empty)
    weights = _compare(_trainable(model), _trainable(rebuilt))
    slots = _compare(_slots(live, model), _slots(optimizer, rebuilt))
    from_cold = _compare(_trainable(model), _trainable(cold))
    show(f"resumed: {weights} weights and {slots} slots equal to the uninterrupted run's, bit for bit")
    show(f"cold start: {from_cold} weights equal")

    exact = all(found.equal == found.total > 0 for found in (loaded, weights, slots)) and from_cold.equal < trainable
    say(f"Verdict: the resumed run {'equals' if exact else 'does NOT equal'} the uninterrupted one")
    return exact


def _base() -> Any:
    """Return the frozen model; the same weights every time."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=28,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )


def _trained(model: Any, folder: Path) -> Any:
    tokens = torch.randint(0, 128, (4 * STEPS, 16), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # the norm's rounding would depend on the order of the parameters
        optim="adamw_torch",
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _rebuilt(checkpoint: Path) -> tuple[Any, torch.optim.AdamW]:
    """Return the model with the checkpoint's adapter, and an optimizer with one group and no state."""
    model = PeftModel.from_pretrained(_base(), checkpoint, is_trainable=True)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)


def _refusal(optimizer: torch.optim.Optimizer, checkpoint: Path) -> str:
    try:
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    except ValueError as error:
        return f"ValueError: {error}"
    return "accepted"


def _train_on(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    generator = torch.Generator().manual_seed(2)
    for _ in range(MORE_STEPS):
        tokens = torch.randint(0, 128, (4, 16), generator=generator)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def _trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _slots(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{slot}": value
        for name, parameter in _trainable(model).items()
        for slot, value in optimizer.state[parameter].items()
    }


class _Equality(NamedTuple):
    equal: int
    total: int

    def __str__(self) -> str:
        return f"{self.equal}/{self.total}"


def _compare(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> _Equality:
    """Return how many tensors are the same bit for bit under the same name."""
    return _Equality(
        sum(name in b and torch.equal(value, b[name]) for name, value in a.items()), len(a.keys() | b.keys())
    )
