"""Where tests run: the device that `-m gpu` compares with the CPU, and the one of all others; and in what dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_memdlm.backbones import expert_ffn


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dllm-memdlm")
    group.addoption("--device", default="cuda", help="of the tests marked gpu; cpu to try the tests themselves")
    group.addoption("--default-device", help="make every tensor there, and train there (cuda; default: the CPU)")
    group.addoption("--tables", type=Path, help="write what tests have measured into this folder")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--default-device")
    if name is None:
        return
    torch.set_default_device(name)

    class Generator(torch.Generator):
        """Where the tensors are that it draws."""

        def __new__(cls, device: Any = None) -> Any:
            return super().__new__(cls, device=torch.device(name) if device is None else device)

    torch.Generator = Generator


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device to compare with the CPU; without one the test is skipped."""
    wanted = torch.device(pytestconfig.getoption("--device"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device; torch {torch.__version__} finds none")
    return wanted


@pytest.fixture
def products(monkeypatch) -> set[torch.dtype]:
    """What the grouped products of experts compute in, from now on."""
    seen: set[torch.dtype] = set()

    def seeing(product: Any) -> Any:
        def computed(x: Tensor, *others: Any) -> Tensor:
            seen.add(x.dtype)
            return product(x, *others)

        return computed

    for name in ("grouped_linear", "grouped_outer"):
        monkeypatch.setattr(expert_ffn, name, seeing(getattr(expert_ffn, name)))
    return seen


@pytest.fixture(autouse=True, scope="session")
def sorted_rows() -> None:
    """No rows are padded, which a GPU does not do either: small models go the way of large ones."""
    from dllm_memdlm.backbones import moe

    moe.FEW_ROWS = 0
