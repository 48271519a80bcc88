"""Write a Trainer's checkpoint with whatever versions are installed, and the names of its parameters as they were live.

Run by ``make.sh`` in an environment for each stack: ``make.py FOLDER MODEL MODE``.
"""

import inspect
import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainingArguments

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
T5_SIZES = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
KEPT = ("optimizer.pt", "trainer_state.json", "config.json", "adapter_config.json", "adapter_model", "model.saf", "pytorch_model")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

folder, kind, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.manual_seed(0)
classes = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", PROJECTIONS, "CAUSAL_LM"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", PROJECTIONS, "CAUSAL_LM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", PROJECTIONS, "CAUSAL_LM"),
    "bert": ("BertConfig", "BertForSequenceClassification", ["query", "value"], "SEQ_CLS"),
    "t5": ("T5Config", "T5ForConditionalGeneration", ["q", "v"], "SEQ_2_SEQ_LM"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", ["query", "key", "value"], "SEQ_CLS"),
}
config_class, model_class, targets, task = classes[kind]
extra = {"gemma": {"num_key_value_heads": 2, "head_dim": 8}, "qwen2": {"num_key_value_heads": 1}}.get(kind, {})
sizes = T5_SIZES if kind == "t5" else {**SIZES, "max_position_embeddings": 40}
config = getattr(transformers, config_class)(vocab_size=32, **sizes, **extra)
config.use_cache = False
model = getattr(transformers, model_class)(config)
if mode == "lora":
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.0, target_modules=targets, task_type=task))
data = []
for number in range(16):
    ids = torch.randint(3, 32, (8,))
    data.append({"input_ids": ids, "labels": number % 2 if task == "SEQ_CLS" else ids})
known = inspect.signature(TrainingArguments).parameters
arguments = TrainingArguments(
    output_dir="run", per_device_train_batch_size=4, max_steps=3, save_steps=3, report_to=[], weight_decay=0.1,
    learning_rate=1e-3, disable_tqdm=True, **{"use_cpu" if "use_cpu" in known else "no_cuda": True},
)
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
optimizer = trainer.optimizer
while hasattr(optimizer, "optimizer"):
    optimizer = optimizer.optimizer
live = {id(parameter): name for name, parameter in model.named_parameters()}
folder.mkdir(parents=True)
for file in sorted(Path("run/checkpoint-3").iterdir()):
    if file.name.startswith(KEPT):
        shutil.copy(file, folder)
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
if mode == "lora":
    versions["peft"] = peft.__version__
names = [[live[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
(folder / "names.json").write_text(json.dumps({"versions": versions, "groups": names}, indent=1) + "\n")
shutil.rmtree("run")
