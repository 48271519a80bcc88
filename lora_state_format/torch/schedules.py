"""Learning rate schedulers of a resumed run: their saved state, fitted to the groups there are, or to a new rate."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping
from typing import Any, Final, Literal

from lora_state_format.errors import OptionError
from lora_state_format.model.text import class_path

__all__ = ["load_scheduler", "rate_of"]

logger = logging.getLogger("lora_state_format")

Rate = Literal["saved", "current"]

SHELLS: Final = frozenset({"accelerate.scheduler.AcceleratedScheduler"})
"""Classes of schedulers that only hand on to the one in their attribute ``scheduler``."""

PROGRESS: Final = (
    "best",
    "num_bad_epochs",
    "num_good_epochs",
    "cooldown_counter",
    "warmup_counter",
    "last_epoch",
    "_streaming_avg",
)
"""What ReduceLROnPlateau and transformers' GreedyLR have seen of a run; what else they keep is how they were built."""

YARDSTICK: Final = ("mode", "threshold_mode", "smooth", "window_size")
"""What says how they measure, without which that means something else."""


def rate_of(policies: Mapping[str, Any]) -> Rate:
    """Return what the policies of a load say about the learning rate, as ``load_scheduler`` takes it."""
    value = (policies.get("options") or {}).get("lr")
    return "current" if isinstance(value, str) and value == "current" else "saved"


def load_scheduler(scheduler: Any, saved: Mapping[str, Any], *, lr: Rate = "saved") -> None:
    """Let a scheduler go on where a saved one stopped; call it after ``load_optimizer``.

    Args:
        scheduler: A scheduler of ``torch.optim.lr_scheduler`` over the live optimizer, just built. Its groups may be
            others than those of the saved one.
        saved: The ``state_dict()`` of the scheduler of the saved run.
        lr: With ``saved``, the saved schedule goes on. With ``current``, for a load with
            ``options={"lr": "current"}``, the live schedule does, from the step that the saved run had reached: it is
            stepped as often as the saved one was. A scheduler whose steps depend on what it is told (ReduceLROnPlateau,
            transformers' GreedyLR) goes on from the live rate and remembers what the saved one had been told: it is one
            that was built with the new rate, was told the same, and had not changed the rate until now. How often the
            saved one had changed its own is not in its state.

    Raises:
        OptionError: With ``current``, a scheduler that has taken steps already, whose state does not say how many the
            saved one took, or that measures in another way than the saved one.
    """
    while class_path(type(scheduler)) in SHELLS:
        scheduler = scheduler.scheduler
    if lr == "saved":
        scheduler.load_state_dict(_fitted(saved, scheduler))
    elif "metrics" in inspect.signature(scheduler.step).parameters:
        _remember(scheduler, saved)
    else:
        _advance(scheduler, saved)


def _remember(scheduler: Any, saved: Mapping[str, Any]) -> None:
    """Let a new scheduler that is told metrics know what the saved one had been told; the live rate stays."""
    title, live = type(scheduler).__name__, scheduler.state_dict()
    for key in YARDSTICK:
        if key in saved and saved[key] != live.get(key):
            raise OptionError(
                f"{title} was saved with {key}={saved[key]!r} and is built with {key}={live.get(key)!r}, by which the "
                f"best that it remembers is another: build it with {key}={saved[key]!r}"
            )
    scheduler.load_state_dict({key: saved[key] for key in PROGRESS if key in saved})
    logger.warning(
        "%s goes on from the live rate, %s: its state does not say how often it had changed that of the saved run",
        title,
        ", ".join(f"{float(group['lr']):g}" for group in scheduler.optimizer.param_groups),
    )


def _advance(scheduler: Any, saved: Mapping[str, Any]) -> None:
    """Step a new scheduler as often as the saved one was."""
    taken, wanted = _steps(scheduler.state_dict()), _steps(saved)
    title = type(scheduler).__name__
    if wanted is None or taken is None:
        raise OptionError(f"{title} does not say in its state how many steps it has taken; step it to where it was")
    if taken:
        raise OptionError(
            f"{title} has taken {taken} steps: to go on with its own rates, load right after it was built"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have a step of the optimizer before each one
        for _ in range(wanted):
            scheduler.step()


def _steps(state: Mapping[str, Any]) -> int | None:
    """Return how many steps a scheduler has taken; a chain of several counts in its members."""
    found = state.get("last_epoch")
    if found is None and (members := state.get("_schedulers")):
        return _steps(members[0])
    return found if isinstance(found, int) else None


def _fitted(saved: Mapping[str, Any], scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's saved state for the groups that the optimizer has now, which may be others than then.

    What a scheduler keeps for each group comes from the groups, into which the saved values have been loaded by name.
    """
    groups = scheduler.optimizer.param_groups
    live, fitted = scheduler.state_dict(), dict(saved)
    members = getattr(scheduler, "_schedulers", None)
    if members and "_schedulers" in saved:
        fitted["_schedulers"] = [
            _fitted(own, member) for own, member in zip(saved["_schedulers"], members, strict=True)
        ]
    count = next((len(saved[key]) for key in ("base_lrs", "_last_lr", "min_lrs") if saved.get(key)), len(groups))
    if count != len(groups):
        fitted |= {
            key: live[key]
            for key, value in saved.items()
            if isinstance(value, list) and len(value) == count and key != "_schedulers" and key in live
        }
        logger.warning("the scheduler was saved with %d groups, and now has %d", count, len(groups))
    if "base_lrs" in saved:
        fitted["base_lrs"] = [group["initial_lr"] for group in groups]
    if "_last_lr" in saved:
        fitted["_last_lr"] = [group["lr"] for group in groups]
    return fitted
