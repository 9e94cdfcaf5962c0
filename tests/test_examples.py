"""Every program in examples/ runs shortened and prints the right results. The README lists all of them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "flat_lora.py": ["sklearn"],
    "label_noise.py": ["sklearn"],
    "losses.py": ["sklearn"],
    "muon_digits.py": ["sklearn"],
    "lightning_digits.py": ["sklearn", "lightning"],
    "accelerate_digits.py": ["sklearn", "accelerate"],
    "transformers_text.py": ["transformers", "accelerate"],
}
SAYS = {
    "flat_lora.py": r"\nLoRA: accuracy on mirrored images ([\d.]+)%, [\d.]+ ms per step\n"
    r"Flat-LoRA: accuracy on mirrored images ([\d.]+)%, [\d.]+ ms per step",
    "label_noise.py": r"accuracy on clean test images: SGD ([\d.]+)%, SAM ([\d.]+)%",
    "losses.py": r"(?s)"
    + ".*".join(
        rf"{name}: accuracy on clean test images ([\d.]+)%, [\d.]+ ms per step"
        for name in ("SGD", "SAM", "OutputBiasForgetting", "Functional", "SelfDistillation", "ReleasedSADT")
    ),
    "muon_digits.py": r"AdamW: accuracy on test images ([\d.]+)%.*\nMuon: accuracy on test images ([\d.]+)%.*\n"
    r"SAM and Muon: accuracy on test images ([\d.]+)%, [\d.]+ ms per step \([\d.]+x AdamW\), [\d.]+ bytes of state",
    "lightning_digits.py": r"accuracy on test images ([\d.]+)%",
    "accelerate_digits.py": r"accuracy on test images ([\d.]+)%",
    "transformers_text.py": r"([\d.]+) before training, ([\d.]+) after",
}


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs(name: str) -> None:
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    found = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--epochs", "1", "--samples", "200"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    said = re.search(SAYS[name], found.stdout)
    assert said, found.stdout
    numbers = [float(x) for x in said.groups()]
    if name == "transformers_text.py":
        before, after = numbers
        assert 6 < before < 8 and after < before  # 128 equally likely values have 7 bits
    else:
        assert all(x > 30 for x in numbers)  # chance is 10% with 10 classes


def test_the_readme_lists_every_example() -> None:
    listed = set(re.findall(r"`(\w+\.py)`", (EXAMPLES / "README.md").read_text()))
    assert listed == NEEDS.keys() == {path.name for path in EXAMPLES.glob("*.py")} - {"data.py"}
