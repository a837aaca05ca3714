"""Progress of a stage: its process writes it to a small file, the process that started it draws the bar."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PERIOD = 0.5  # seconds


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it holds the old or the new content at any moment, even if this process is killed."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


class Report:
    """Reports the progress of a stage; ends the stage if the process that watches it, `parent`, is gone."""

    def __init__(self, path: Path, parent: int) -> None:
        self.path, self.parent, self.last = path, parent, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, steps: int, text: str = "") -> None:
        if os.getppid() != self.parent:
            raise SystemExit("the training command has ended; this stage stops and can be continued")
        if step < steps and time.monotonic() - self.last < PERIOD:
            return
        self.last = time.monotonic()
        write_atomically(self.path, json.dumps({"step": step, "steps": steps, "text": text}).encode())


def _bars() -> Progress:
    text = TextColumn("{task.fields[text]}")
    return Progress(
        TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False), text,
    )  # fmt: skip


def follow(running: dict[str, tuple[subprocess.Popen, Path]]) -> dict[str, int]:
    """Draws one bar per stage until all have ended or one has failed; returns {name: exit code}."""
    with _bars() as bars:
        tasks = {name: bars.add_task(name, total=None, text="") for name in running}
        seen = dict.fromkeys(running, -1)
        while True:
            codes = {name: process.poll() for name, (process, _) in running.items()}
            for name, (_, path) in running.items():
                seen[name] = _draw(bars, tasks[name], name, path, seen[name])
            ended = {name: code for name, code in codes.items() if code is not None}
            if any(ended.values()):
                _end([process for process, _ in running.values()])
            if len(ended) == len(running):
                return ended
            time.sleep(PERIOD)


def _draw(bars: Progress, task: TaskID, name: str, path: Path, seen: int) -> int:
    if not path.exists():
        return seen
    state = json.loads(path.read_text())
    bars.update(task, completed=state["step"], total=state["steps"], text=state["text"])
    tenth = 10 * state["step"] // max(1, state["steps"])
    if tenth > seen and not sys.stdout.isatty():  # a log file gets a line per tenth instead of a moving bar
        bars.console.print(
            f"{time.strftime('%X')} {name} {state['step']}/{state['steps']} {state['text']}", soft_wrap=True
        )
    return max(tenth, seen)


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()
