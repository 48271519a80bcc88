"""Four gloo ranks that save one state together, over an older one, while something happens to one of them.

Usage: together_run.py FOLDER POINTS
POINTS is a JSON list of ``[rank, call, count, what, background]``: at the count-th call of ``os.CALL`` during the save
the rank is killed (``what`` is "kill"), or the call fails as on a full disk ("fail"). Each point gets a folder of its
own, and four processes, forked. The result is a JSON list: the step of the state at the path afterwards, whether every
byte of it is verified, what each rank raised, the temporary files that are left, and, where files were being renamed,
the state's files after a save that nothing disturbs.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from lora_state_format import open_state, verify  # noqa: E402
from lora_state_format.io import atomic  # noqa: E402
from lora_state_format.torch import save_optimizer  # noqa: E402

WORLD = 4
SHARD = 14_500  # bytes of tensors in a file: 6 files, of which ranks 0 and 2 write two


def armed(call: str, count: int, what: str) -> None:
    """Let the count-th call of a function of ``os`` from now on be the end of this rank, or fail."""
    left = count

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_end(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call_or_end

    setattr(os, call, counted(getattr(os, call)))
    if call == "replace":  # what has a free name is renamed by the C library's renameat2
        atomic.move_new = counted(atomic.move_new)


def rank_main(rank: int, folder: Path, step: int, point: list[Any] | None) -> None:
    """Train up to a step and save; what is raised goes to a file."""
    store: Any = dist.FileStore(str(folder / f"store.{step}"), WORLD)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=30))
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(*sizes) for sizes in ((40, 41), (41, 43), (43, 40)) * 2))
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in net:
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, foreach=False)
    for _ in range(step):
        net(torch.ones(2, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if point and rank == point[0]:
        armed(*point[1:4])
    said = "nothing"
    try:
        path = folder / "state" / "optimizer.safetensors"
        if point and point[4]:
            save_optimizer(optimizer, net, path, max_shard_size=SHARD, background=True).wait()
        else:
            save_optimizer(optimizer, net, path, max_shard_size=SHARD)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"said.{rank}").write_text(said)


def saved(folder: Path, step: int, point: list[Any] | None = None) -> list[str]:
    """Let four processes save the state of a step; what each of them raised, "killed" for one that is gone."""
    for old in folder.glob("said.*"):
        old.unlink()
    processes = []
    for rank in range(WORLD):
        process = os.fork()
        if process == 0:
            try:
                rank_main(rank, folder, step, point)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        processes.append(process)
    for process in processes:
        os.waitpid(process, 0)
    files = [folder / f"said.{rank}" for rank in range(WORLD)]
    return [file.read_text() if file.exists() else "killed" for file in files]


def main(folder: Path, points: list[list[Any]]) -> list[dict[str, Any]]:
    first = folder / "first"
    first.mkdir()
    assert saved(first, 1) == ["nothing"] * WORLD
    results = []
    for number, point in enumerate(points):
        own = folder / str(number)
        own.mkdir()
        shutil.copytree(first / "state", own / "state")
        said = saved(own, 2, point)
        path = own / "state" / "optimizer.safetensors"
        with open_state(path) as state:
            step = next(iter(state.values()))["step"].item()
        result = {"step": step, "whole": verify(path).ok, "said": said}
        result["left"] = len(list(path.parent.glob(".*")))
        if point[1] == "replace":  # files without an index, or an index whose predecessor's files are still there
            assert saved(own, 3) == ["nothing"] * WORLD
            result["files"] = sorted(file.name.partition("-")[0] for file in path.parent.iterdir())
        results.append(result)
    return results


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "results.json").write_text(json.dumps(main(target, json.loads(sys.argv[2]))))
