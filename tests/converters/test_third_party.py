"""A converter in a package of its own: built into a wheel, installed, and used by its name and by detection."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from lora_state_format.format.reading import open_state

PACKAGE = Path(__file__).parents[1] / "third_party"


def test_an_installed_package_adds_a_format(tmp_path: Path) -> None:
    source = Path(shutil.copytree(PACKAGE, tmp_path / "source"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(source / "dist" / built.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(tmp_path / "site")

    moments = {"a.weight": {"step": 3, "exp_avg": [1.0, 2.0], "exp_avg_sq": [0.5, 0.25]}}
    (tmp_path / "run.moments.json").write_text(json.dumps({"moments": moments}))

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "lora_state_format", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]])}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert "json_moments" in run("formats")
    output = run("convert", "run.moments.json", "optimizer.safetensors")
    assert output.startswith("converted run.moments.json (json_moments) to optimizer.safetensors")
    run("convert", "run.moments.json", "again.safetensors", "--from", "json_moments")
    with open_state(tmp_path / "optimizer.safetensors") as state:
        assert state["a.weight"]["exp_avg"].numpy().tolist() == [1.0, 2.0]
        assert state.origin["format"] == "json_moments"
