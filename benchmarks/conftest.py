"""What every benchmark's JSON says of the machine."""

from __future__ import annotations

from typing import Any

from mixdq_ao.app.environment import environment


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["mixdq"] = environment()
