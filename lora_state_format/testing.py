"""For tests of your own training loop: does it resume where it stopped?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["assert_resume_is_exact"]

Run = TypeVar("Run")


def assert_resume_is_exact(
    build: Callable[[], Run],
    train: Callable[[Run, range], object],
    save: Callable[[Run, Path], object],
    resume: Callable[[Path], Run],
    *,
    model: Callable[[Any], Any] = itemgetter(0),
    before: int = 3,
    after: int = 3,
) -> None:
    """Raise ``AssertionError`` unless a resumed run equals the uninterrupted one, and a cold start does not.

    A run is what your loop needs to go on, a tuple of model and optimizer for example; ``model`` takes the model out of
    it. ``build`` makes one at its start, the same every time; ``train`` takes it through the steps of a range, whose
    batches depend on nothing but the step; ``save`` writes it into an empty folder, ``resume`` makes one from there.
    All bits of all weights are compared.
    """

    def ended(run: Run, start: int) -> Mapping[str, Any]:
        train(run, range(start, before + after))
        return {name: tensor.detach().clone() for name, tensor in model(run).state_dict().items()}

    uninterrupted = ended(build(), 0)
    saved, cold = build(), build()
    train(saved, range(before))
    model(cold).load_state_dict(model(saved).state_dict())
    with tempfile.TemporaryDirectory() as folder:
        save(saved, Path(folder))
        if difference := _difference(ended(saved, before), uninterrupted):
            raise AssertionError(
                f"two uninterrupted runs differ: {difference}; seed the loop, let batches depend on the step alone, "
                "and let saving change nothing"
            )
        if difference := _difference(ended(resume(Path(folder)), before), uninterrupted):
            raise AssertionError(
                f"resumed after {before} steps, the run differs from the uninterrupted one {after} steps later: "
                f"{difference}"
            )
    if not _difference(ended(cold, before), uninterrupted):
        raise AssertionError(
            "a cold start, with the weights but without the optimizer's state, ends in the same weights, so this shows "
            "nothing: train for more steps, at a learning rate that is not 0, with an optimizer that keeps state"
        )


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """In words, how tensors differ from those of the same names; empty if they don't."""
    if found.keys() != expected.keys():
        return f"other tensors: {sorted(found.keys() ^ expected.keys())[:3]}"
    differing = [name for name, tensor in expected.items() if not tensor.equal(found[name])]
    if not differing:
        return ""
    first = differing[0]
    if found[first].shape != expected[first].shape:
        return f"{len(differing)} of {len(expected)} tensors, '{first}' in its shape"
    largest = (found[first].double() - expected[first].double()).abs().max().item()
    return f"{len(differing)} of {len(expected)} tensors, '{first}' by up to {largest:.3g}"
