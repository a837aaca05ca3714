"""Test kernels without a GPU: run them in Triton's interpreter, read their code, compile them for real targets.

TRITON_INTERPRET=1 python ...             with interpreter(): torch.compile(f)(*cpu_tensors)
code = cuda_code(f, *inputs)              the code that torch.compile would run on a GPU
for name, source in kernels(code).items():
    print(name, compile_for(source, "sm_90"))
"""

import contextlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import assembly
from .compat_eager import is_traceable_wrapper_subclass

ONE_CHOICE = {"max_autotune": False, "max_autotune_gemm": False, "shape_padding": False}
"""Settings of Inductor with which it times nothing: that would need a GPU."""


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """Facts about a compiled kernel, from the assembler.

    shared_bytes: shared memory per program; fits: whether the architecture has as much. registers: per thread.
    spill_bytes: local memory per thread, 0 when nothing spills. instructions: the tensor-core instructions in the
    machine code and the PTX ("IMMA.16832.S8.S8.SAT", "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"). loop: the
    main loop, by :func:`inductor_kernels.assembly.loop`.
    """

    shared_bytes: int
    registers: int
    spill_bytes: int
    instructions: tuple[str, ...]
    warps: int
    fits: bool
    loop: assembly.Loop | None


def capability(arch: str) -> int:
    """The compute capability of an architecture: 90 for "sm_90"."""
    match = re.fullmatch(r"sm_(\d{2,3})a?", arch)
    if not match:
        raise ValueError(f"arch={arch!r}: expected a GPU architecture such as 'sm_90'")
    return int(match[1])


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Let Inductor generate Triton code for CPU tensors, which Triton's interpreter runs.

    Triton reads TRITON_INTERPRET when it is imported, so the process must have been started with it. Use small
    problems: a program takes milliseconds per step.
    """
    from triton import knobs

    if not knobs.runtime.interpret or os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("interpreter(): start the process with TRITON_INTERPRET=1, before torch is imported")
    from . import compat, interpreted, lowering, pretend

    assert lowering
    options = {"cpu_backend": "triton", "compile_threads": 1, "force_disable_caches": True}
    with contextlib.ExitStack() as stack:
        stack.enter_context(pretend.driver(90, "cpu"))
        for context in (*interpreted.repairs(), compat.config.patch(options), compat.without_precompiling()):
            stack.enter_context(context)
        torch.compiler.reset()
        try:
            yield
        finally:
            torch.compiler.reset()


def _unwrap(value: Tensor, plain: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """Append the plain tensors inside a tensor subclass to ``plain``, each once. Returns a function that rebuilds the
    subclass from such a list."""
    if not is_traceable_wrapper_subclass(value):
        index = next((i for i, known in enumerate(plain) if known is value), len(plain))
        if index == len(plain):
            plain.append(value)
        return lambda tensors: tensors[index]
    names, context = value.__tensor_flatten__()
    parts = {name: _unwrap(getattr(value, name), plain) for name in names}
    build, size, stride = type(value).__tensor_unflatten__, value.shape, value.stride()
    return lambda tensors: build({name: part(tensors) for name, part in parts.items()}, context, size, stride)


def _with_state(fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[Tensor]]:
    """A module as a function whose first arguments are its parameters and buffers, and these tensors."""
    if not isinstance(fn, torch.nn.Module):
        return fn, []
    state = {**dict(fn.named_parameters()), **dict(fn.named_buffers())}

    def call(*arguments: Any) -> Any:
        values, inputs = arguments[: len(state)], arguments[len(state) :]
        return torch.func.functional_call(fn, dict(zip(state, values, strict=True)), inputs)

    return call, list(state.values())


class Lowered(NamedTuple):
    """The generated ``code``, Inductor's ``GraphLowering``, and the ``traced`` graph."""

    code: str
    graph: Any
    traced: torch.fx.GraphModule


def cuda_code(fn: Callable[..., Any], *inputs: Any, arch: str = "sm_90") -> str:
    """The code Inductor would run for ``fn(*inputs)`` on a GPU of this architecture.

    fn: a function, or a module, whose state is treated like inputs. inputs: tensors on any device, of which only shape,
    strides and type matter; tensor subclasses are unwrapped; other values are constants. The code is for inference,
    with one choice per operator.
    """
    return _lowered(fn, inputs, arch).code


def cudagraph_obstacles(fn: Callable[..., Any], *inputs: Any, arch: str = "sm_90") -> list[str]:
    """Why ``torch.compile(fn, mode="reduce-overhead")`` would not use CUDA graphs; empty where it would.

    Arguments as for :func:`cuda_code`. Lists Inductor's own reasons (an operator, a device, an input that is written
    to), and calls in the generated code that wait for the GPU.
    """
    from . import compat

    # Folding would compute constants, which attention has, on a real GPU.
    lowered = _lowered(fn, inputs, arch, joint_graph_constant_folding=False)
    called = lowered.code.split("async_compile.wait")[-1]
    waits = [word for word in (".item()", ".tolist()", ".cpu()", "_local_scalar_dense") if word in called]
    return compat.cudagraph_reasons(lowered.graph, lowered.traced) + [f"waits for the GPU: {word}" for word in waits]


def _lowered(fn: Callable[..., Any], inputs: tuple[Any, ...], arch: str, **options: Any) -> Lowered:
    """``options``: settings of ``torch._inductor.config``."""
    from . import compat, lowering, pretend
    from .methods import Methods

    assert lowering
    fn, state = _with_state(fn)
    values = [*state, *inputs]
    plain: list[Tensor] = []
    rebuild = {i: _unwrap(v, plain) for i, v in enumerate(values) if isinstance(v, Tensor)}

    def on_plain(*tensors: Tensor) -> Any:
        with Methods():
            return call(tensors)

    def call(tensors: Sequence[Tensor]) -> Any:
        return fn(*(rebuild[i](list(tensors)) if i in rebuild else v for i, v in enumerate(values)))

    with pretend.cuda(capability(arch)), compat.FakeTensorMode() as mode, torch.no_grad():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda:0") for t in plain]
        return Lowered(*compat.generate(on_plain, fakes, mode, ONE_CHOICE | options))


def kernels(code: str) -> dict[str, str]:
    """The sources of the Triton kernels in generated code, by name, in order of appearance."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.S))


def compile_for(source: str, arch: str) -> KernelInfo:
    """Compile the source of one of :func:`kernels`, or code with a single kernel, with the assembler Triton ships."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import pretend

    found = kernels(source)
    if len(found) > 1:
        raise ValueError(f"source: {len(found)} kernels ({', '.join(found)}); expected one, see kernels()")
    source = next(iter(found.values()), source)
    number = capability(arch)
    with pretend.driver(number, "cuda"), tempfile.TemporaryDirectory() as folder:
        tuner = _load(source, folder)
        config = tuner.configs[0]
        meta = tuner._create_compile_meta(config)
        options = tuner._create_compile_options(config, meta)
        ast = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
        compiled = triton_compile(ast, target=GPUTarget("cuda", number, 32), options=options)
        return _inspect(compiled, number, folder)


def _load(source: str, folder: str) -> Any:
    """The autotuner object of a kernel, from its source."""
    name = re.findall(r"^def (triton_\w+)\(", source, re.M)[-1]
    path = Path(folder, f"{name}.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _inspect(compiled: Any, number: int, folder: str) -> KernelInfo:
    import triton

    from .tiles import SHARED_BYTES, family

    binaries = Path(triton.__file__).parent / "backends/nvidia/bin"
    path = Path(folder, "kernel.cubin")
    path.write_bytes(compiled.asm["cubin"])

    def tool(*command: object) -> str:
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout

    usage = tool(binaries / "cuobjdump", "-res-usage", path)
    machine = tool(binaries / "nvdisasm", "-c", path)
    used = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return KernelInfo(
        shared_bytes=compiled.metadata.shared,
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        instructions=tuple(sorted(assembly.products(machine, compiled.asm["ptx"]))),
        warps=compiled.metadata.num_warps,
        fits=compiled.metadata.shared <= SHARED_BYTES[family(number)],
        loop=assembly.loop(machine),
    )
