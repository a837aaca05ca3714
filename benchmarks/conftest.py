"""Adds the machine to the JSON of every benchmark."""

from __future__ import annotations

from typing import Any

from mixdq_ao.app.environment import environment


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["mixdq"] = environment()
