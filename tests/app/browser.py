"""A headless Chromium that is spoken to through two pipes (Chrome DevTools Protocol), with the standard library."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"),
    # The page is a file: nothing else of the browser may look for a network.
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 90.0  # seconds an answer may take on a busy machine


class Browser:
    """Opens pages and runs scripts in them; a context manager."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900) -> None:
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        options = [*OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]

        # The protocol's pipes are file descriptors 3 (what the browser reads) and 4 (what it writes).
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", script, "bash", str(FOUND), *options]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=quiet, stderr=quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._count = b"", 0
        self._session: str | None = None

    def __enter__(self) -> Browser:
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command; raises AssertionError where the browser refuses it or says nothing."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def open(self, page: Path) -> None:
        """Waits until a file is loaded."""
        self.send("Page.navigate", url=page.as_uri())
        end = time.monotonic() + PATIENCE
        while not self.run(f"location.href === {json.dumps(page.as_uri())} && document.readyState === 'complete'"):
            assert time.monotonic() < end, "the page is still loading"
            time.sleep(0.05)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def mouse(self, kind: str, x: float, y: float) -> None:
        """ "mousePressed", "mouseMoved" or "mouseReleased" at a point of the window, with the left button."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
