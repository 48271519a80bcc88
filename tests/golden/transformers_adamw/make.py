"""Make ``optimizer.pt`` of the AdamW that transformers had until 4.x, and what its next steps make of it.

``python make.py FOLDER`` in an environment with the versions of ``versions.txt``.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch

SHAPES = {"a": (4, 3), "b": (5,)}


def model() -> Any:
    torch.manual_seed(0)
    made = torch.nn.ParameterDict()
    for name, shape in SHAPES.items():
        made[name] = torch.nn.Parameter(torch.randn(shape))
    return made


def advance(made: Any, optimizer: Any, steps: range) -> None:
    """Steps whose gradients depend on the number of the step only."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in made.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def contents(made: Any, optimizer: Any) -> dict[str, Any]:
    slots = {name: dict(optimizer.state[parameter]) for name, parameter in made.items()}
    return copy.deepcopy({"weights": {name: p.detach() for name, p in made.items()}, "state": slots})


def main(folder: Path) -> None:
    from transformers import AdamW

    folder.mkdir(parents=True, exist_ok=True)

    made = model()
    optimizer = AdamW(made.values(), lr=1e-2, weight_decay=0.1, no_deprecation_warning=True)
    advance(made, optimizer, range(3))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    saved = contents(made, optimizer)
    advance(made, optimizer, range(3, 6))
    torch.save({"saved": saved, "later": contents(made, optimizer)}, folder / "expected.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
