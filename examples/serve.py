"""A quantized pipeline behind HTTP, with the standard library: python -m examples.serve quantized --port 8000

    curl -o circle.png "http://127.0.0.1:8000/?prompt=a+large+red+circle&steps=4&seed=7"

The directory was stored by ``mixdq quantize --out`` or ``python -m examples.finetune``; any diffusers pipeline works.
It draws one picture at a time: a model on one device gains nothing from drawing two at once.
"""

from __future__ import annotations

import argparse
import io
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from mixdq_ao import Sampling, bos_aware
from mixdq_ao.app.inputs import load_pipeline
from mixdq_ao.models.bos_encoder import bos_embedding_of
from mixdq_ao.models.pipelines import denoiser, generate_all

MOST_STEPS = 50


def load(directory: str) -> Any:
    """Loads a pipeline, quantized or not, ready to draw."""
    pipe = load_pipeline(directory)
    return bos_aware(pipe) if bos_embedding_of(denoiser(pipe)) is not None else pipe


def server(pipe: Any, port: int) -> ThreadingHTTPServer:
    """A server that listens on this machine only. port 0: any free port, in ``server_port``."""
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if urlsplit(self.path).path != "/":
                self.send_error(HTTPStatus.NOT_FOUND, "pictures are at /?prompt=...")
                return
            try:
                prompt, sampling = asked(self.path)
            except ValueError as e:
                self.send_error(HTTPStatus.BAD_REQUEST, str(e))
                return
            with one_at_a_time:
                image = generate_all(pipe, [prompt], sampling)[0]
            data = io.BytesIO()
            Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(data, "PNG")
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(data.tell()))
            self.end_headers()
            self.wfile.write(data.getvalue())

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def asked(path: str) -> tuple[str, Sampling]:
    """The prompt and sampling in a request's path. Raises ValueError saying what is wrong."""
    query = parse_qs(urlsplit(path).query)
    prompt = query.get("prompt", [""])[0].strip()
    if not prompt:
        raise ValueError("prompt is missing; ask for /?prompt=...")
    steps, seed = (whole(query, name, default) for name, default in (("steps", 4), ("seed", 0)))
    if not 1 <= steps <= MOST_STEPS or not 0 <= seed < 2**63:
        raise ValueError(
            f"steps is {steps} and seed {seed}; expected 1 to {MOST_STEPS} steps and a seed of 0 to 2^63 - 1"
        )
    return prompt, Sampling(steps=steps, seed=seed)


def whole(query: dict[str, list[str]], name: str, default: int) -> int:
    text = query.get(name, [str(default)])[0]
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} is {text[:20]!a}, expected a whole number") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("pipeline")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    with server(load(args.pipeline), args.port) as http:
        print(f"http://127.0.0.1:{http.server_port}/?prompt=a+large+red+circle", flush=True)
        http.serve_forever()


if __name__ == "__main__":
    main()
