"""Fixtures that several modules share."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import resource
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from packaging.version import Version

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]

# Processes that tests start find the package of this checkout wherever they run: it need not be installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# A process that collects open files fails here, on machines that allow more as on those that allow 1,024.
limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, limit), limit))

# A time limit for each example fails on a busy machine and says nothing.
settings.register_profile("tests", deadline=None)
settings.register_profile("short", deadline=None, max_examples=20)  # for make test-pythons
settings.register_profile("long", deadline=None, max_examples=10_000)  # pytest --hypothesis-profile long
settings.load_profile("tests")


OLDER_WARNINGS = (
    "ignore:Already found a .peft_config. attribute:UserWarning",
    "ignore:Converting a tensor with requires_grad=True:UserWarning",
    "ignore:Could not find a config file:UserWarning",
    "ignore:Skipping serialization of:UserWarning",
    "ignore:The epoch parameter in:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:mtime may not be reliable:UserWarning",
    "ignore:.torch.cpu.amp.autocast:FutureWarning",
)
"""Warnings of older versions of torch, transformers and PEFT (make test-lowest, test-middle)."""


def pytest_configure(config: pytest.Config) -> None:
    if older("torch", "2.13"):
        for line in OLDER_WARNINGS:
            config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what an older version cannot do; ``SINCE`` says why."""
    for item in items:
        for part, package, version, reason in SINCE:
            if part in item.nodeid and older(package, version):
                item.add_marker(pytest.mark.skip(f"{package} before {version}: {reason}"))


SINCE: tuple[tuple[str, str, str, str], ...] = (
    ("Muon", "torch", "2.9", "has no Muon"),
    ("test_muon_and_adamw_go_on_exactly", "torch", "2.9", "has no Muon"),
    ("test_one_optimizer_into_two_of_which_one_is_another_class", "torch", "2.9", "has no Muon"),
    ("test_the_table_of_torch", "torch", "2.13", "has fewer configurations than the table in the docs"),
    ("test_decay_that_means_something_else", "torch", "2.7", "does not say decoupled_weight_decay"),
    ("test_a_file_without_a_class_is_known", "torch", "2.7", "does not say decoupled_weight_decay"),
    ("test_files_of_an_older_and_of_a_newer_torch", "torch", "2.7", "does not say decoupled_weight_decay"),
    ("test_torch_falls_short.py::test_a_parameter_without_a_gradient", "torch", "2.9", "falls short otherwise"),
    ("test_torch_falls_short.py::test_untied_parameters", "torch", "2.9", "falls short otherwise"),
    ("test_torch_falls_short.py::test_an_option_that_the_file_lacks", "torch", "2.7", "falls short otherwise"),
    ("Qwen3Moe", "transformers", "4.51", "has no Qwen3"),
    ("test_group_sizes_tell_the_version[config1", "transformers", "4.51", "has no Qwen3"),
    ("test_the_trainers_split", "transformers", "4.53", "groups by the rules of its time: tests/golden/versions"),
    ("full qwen2]", "transformers", "4.53", "groups by the rules of its time: tests/golden/versions"),
    ("test_what_these_libraries_raise", "transformers", "5.0", "does not raise, or something else"),
    ("bias_lora_only", "peft", "0.21", "its files lack the biases"),
    ("biases and a saved head", "peft", "0.21", "its files lack the biases"),
    ("names_of_the_model[k_proj-", "peft", "0.21", "its files lack a module that is called as the adapter"),
    ("names_of_the_model[default-oft", "peft", "0.17", "its OFT has other parameters"),
    ("test_rows_of_trainable_tokens", "peft", "0.15", "has no trainable tokens"),
    ("tokens", "peft", "0.15", "has no trainable tokens"),
    ("test_the_experts_of_a_stacked_parameter", "peft", "0.21", "has other axes there, or no target_parameters"),
    ("test_a_module_to_save_that_the_checkpoint_lacks", "peft", "0.17", "loads an adapter without it"),
    ("[load-1-True]", "torch", "2.9", "another number of ranks rounds the gradients, from an equal state"),
    ("[load-4-True]", "torch", "2.9", "another number of ranks rounds the gradients, from an equal state"),
    ("test_fsdp1_loads_what_fsdp2_saved", "torch", "2.9", "FSDP1 rounds gradients otherwise, from an equal state"),
    ("in_reverse_order[aot_eager", "torch", "2.9", "aot_eager rounds gradients otherwise than eager"),
    ("in_reverse_order[eager after aot_eager", "torch", "2.9", "aot_eager rounds gradients otherwise than eager"),
    ("torch/test_sharded.py", "torch", "2.7", "FSDP2 does not run without an accelerator"),
    ("torch/test_together.py", "torch", "2.7", "FSDP2 does not run without an accelerator"),
)
"""A part of a test's id, and the package and version from which on it can run."""


def older(package: str, version: str) -> bool:
    """Whether a package is there in an older version than that."""
    try:
        return Version(importlib.metadata.version(package)) < Version(version)
    except importlib.metadata.PackageNotFoundError:
        return False


@dataclass(frozen=True)
class Founding:
    """The founding case: LoRA on a model of 28 layers, trained for 3 steps by transformers' Trainer.

    ``path`` is the checkpoint folder; ``slots`` is what the live optimizer held when it was written, by the names of
    ``named_parameters()``, in the optimizer's order. ``model`` and ``optimizer`` are as they were then: copy them
    together (``copy.deepcopy``) to train on.
    """

    path: Path
    slots: dict[str, dict[str, torch.Tensor]]
    model: Any
    optimizer: torch.optim.Optimizer


@pytest.fixture(scope="session")
def founding(tmp_path_factory: pytest.TempPathFactory) -> Founding:
    """A checkpoint saved at lr > 0, without clipping; skipped where there is no PEFT (make test-pythons)."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("founding")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer = _train(folder)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slots = {names[id(p)]: dict(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]}
    return Founding(folder / "checkpoint-3", slots, model, optimizer)


def _train(folder: Path) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    base = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=28,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    rows = torch.randint(0, 64, (12, 16))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        save_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        optim="adamw_torch",
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    return model, trainer.optimizer.optimizer


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], ModuleType]:
    """A module by the path of its file, for the modules here that are in no package."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def spec_reader(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """``spec/reader.py``, the reader that shares no code with the package."""
    return load_module(Path(__file__).parent.parent / "spec" / "reader.py")


@pytest.fixture(scope="session")
def run_ranks() -> Callable[[Path, Path, int, str], None]:
    """Start one process per rank of a script and wait for all: (script, folder for what it makes, ranks, cases)."""

    def run(script: Path, out: Path, world: int, cases: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(world):
            log = out / f"{script.stem}.{world}.{rank}.log"
            command = [sys.executable, "-W", "ignore", str(script), str(out), str(rank), str(world), str(port), cases]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            with log.open("w") as said:
                started.append((subprocess.Popen(command, stdout=said, stderr=said, env=environment), log))
        codes = [process.wait(timeout=600) for process, _ in started]
        assert codes == [0] * world, "\n".join(log.read_text()[-3000:] for _, log in started)

    return run


@pytest.fixture(scope="session")
def plain_states(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """``plain_states.py``: what a state holds as plain values, to compare."""
    return load_module(Path(__file__).with_name("plain_states.py"))
