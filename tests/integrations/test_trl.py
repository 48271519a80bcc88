"""TRL's SFTTrainer with named state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_state_format as lsf
from lora_state_format.foreign.elsewhere import TRAINER
from lora_state_format.integrations.transformers import with_named_state

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

STATE = "checkpoint-6/training_state/optimizer.safetensors"


def make(folder: Path) -> Any:
    """Six steps of supervised fine-tuning on a tokenizer and a text made on the spot."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    words = {f"w{number}": number for number in range(60)}
    tokenizer = Tokenizer(models.WordLevel(words | {"<pad>": 60, "<eos>": 61, "<unk>": 62}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [" ".join(f"w{(7 * row + 3 * word) % 60}" for word in range(10)) for row in range(64)]
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    return SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_steps=6,
            save_steps=2,
            per_device_train_batch_size=4,
            max_length=32,
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        ),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain")
    plain.train()
    whole = with_named_state(make(tmp_path / "whole"), drop_legacy=True)
    whole.train()
    resumed = with_named_state(make(tmp_path / "resumed"), drop_legacy=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = dict(plain.model.named_parameters())
    for model in (whole.model, resumed.model):
        assert all(p.equal(expected[name]) for name, p in model.named_parameters())
    assert (tmp_path / "whole" / STATE).read_bytes() == (tmp_path / "resumed" / STATE).read_bytes()
    assert (tmp_path / "whole" / "checkpoint-6" / "optimizer.pt").read_bytes() == TRAINER
    with lsf.open_state(tmp_path / "whole" / STATE) as state:
        assert set(state) == {name for name, p in expected.items() if p.requires_grad}
