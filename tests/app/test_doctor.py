"""What mixdq doctor says about speed: kinds of layers on many machines, the layers of a plan, measured layers."""

from __future__ import annotations

import json

import pytest
import torch

from mixdq_ao.app.pace import KINDS, Pace, as_measured, kind_of, paces, plan_paces
from mixdq_ao.app.speed import Layer, _calls, speedups
from mixdq_ao.plan import LayerPlan, Plan
from tests.command import run

ROUTES = {f"{bits}-bit weights": "onednn-int8" for bits in (8, 4, 2)}


def machine(*, cpu=(), gpu=None, triton="3.6", **routes):
    """Facts of an imaginary machine. cpu: what its processor has."""
    flags = {name: name in cpu for name in ("amx", "vnni", "bf16")}
    found = ROUTES | {f"{name[1]}-bit weights": route for name, route in routes.items()}
    return {
        "cpu": flags | {"oneDNN": "oneDNN" in cpu},
        "int8 products": found,
        "gpu": {"name": None} if gpu is None else {"name": "Imaginary GPU", **gpu},
        "versions": {"triton": triton},
    }


@pytest.mark.parametrize(
    ("facts", "faster", "baseline", "words"),
    [
        (machine(cpu=("vnni", "oneDNN")), True, "float32", "with VNNI"),
        (machine(cpu=("vnni", "amx", "bf16", "oneDNN")), True, "bfloat16", "with AMX"),
        (machine(cpu=("oneDNN",), w8="avx2"), True, "float32", "multiplies 16-bit pairs"),
        (machine(cpu=("oneDNN",), w8="float32"), False, "float32", "neither VNNI nor AMX"),
        (machine(w8="float32"), False, "float32", "no oneDNN"),
        (machine(gpu={"capability": "sm_90"}), True, "float16", "tensor cores"),
        (machine(gpu={"capability": "sm_75"}), False, "float16", "sm_75"),
        (machine(gpu={"capability": "sm_90"}, triton=None), False, "float16", "Triton is not installed"),
        (machine(gpu={"capability": "sm_90", "rocm": True}), False, "float16", "ROCm"),
    ],
)
def test_8_bit_layers_on_many_machines(facts, faster, baseline, words):
    found = {pace.kind: pace for pace in paces(facts)}
    assert tuple(found) == KINDS
    pace = found["W8A8"]
    assert (pace.faster, pace.baseline) == (faster, baseline) and words in pace.because
    assert not found["weights only"].faster
    than = "float32" if baseline == "float32" else "16 bit"
    assert str(pace).startswith(f"W8A8: {'faster' if faster else 'no faster'} than {than} here, because ")


def test_4_bit_layers_are_exact_without_vnni():
    found = {pace.kind: pace for pace in paces(machine(cpu=("oneDNN",), w8="float32"))}
    assert not found["W8A8"].faster and found["W4A8"].faster and "fit 16 bits" in found["W2A8"].because


def test_a_plan_in_words():
    plan = Plan(
        {
            "a": LayerPlan(weight_bits=4, act_bits=8),
            "b": LayerPlan(weight_bits=4, act_bits=4),
            "c": LayerPlan(weight_bits=8),
            "d": LayerPlan(),
        }
    )
    lines = plan_paces(plan, paces(machine(cpu=("vnni", "oneDNN"))))
    assert lines[0].startswith("2 layers, W4A8: faster")
    assert any(line.startswith("1 layer, weights only: no faster than float32") for line in lines)
    assert "1 layer, 16 bit: as fast as before, because the plan keeps them." in lines
    assert lines[-1].startswith("1 of them") and len(lines) == 4
    assert kind_of(16, 16) == "16 bit" and kind_of(2, 4) == "W2A8"


def test_the_stopwatch_overrules():
    said = Pace("W8A8", "float32", True, "of VNNI")
    times = {"linear": {"float32": 10.0, "bfloat16": 8.0, "W8A8": 4.0}, "conv": {"float32": 3.0, "W8A8": 3.0}}
    times = {name: {**dict.fromkeys(KINDS, 1.0), **of} for name, of in times.items()}
    ratios = speedups(times)
    assert ratios["linear"]["W8A8"] == 2.0 and ratios["conv"]["W8A8"] == 1.0  # of the faster floating point
    found = as_measured([said], ratios)[0]
    assert not found.faster and found.because is None and found.measured == {"linear": 2.0, "conv": 1.0}
    assert str(found) == "W8A8: faster than float32 at linear (2.00 times), not at conv (1.00 times); measured."
    again = as_measured([said], {"linear": ratios["linear"]})[0]
    assert again.faster and again.because == "of VNNI"
    assert str(again).endswith("here, because of VNNI; measured: 2.00 times the speed at linear.")
    other = as_measured([said], {"conv": ratios["conv"]})[0]
    assert str(other) == "W8A8: no faster than float32 here; measured: 1.00 times the speed at conv."
    assert other.to_json()["measured"] == {"conv": 1.0}


def test_what_is_timed_is_quantized():
    layer, x = Layer(torch.nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    calls = _calls(layer, x, torch.bfloat16, compiled=False)
    assert set(calls) == {"float32", "bfloat16", *KINDS}
    assert not hasattr(layer.body.weight, "qdata")  # the original is left alone
    for call in calls.values():
        call()


def test_doctor_speaks_of_a_plan(capsys, tmp_path):
    path = tmp_path / "plan.json"
    Plan({"a": LayerPlan(weight_bits=4, act_bits=8)}).save(path)
    code, out, _ = run(capsys, "doctor", "--plan", path, "--json")
    found = json.loads(out)
    assert code == 0 and [pace["kind"] for pace in found["layers"]] == list(KINDS)
    assert found["advice"][-1].startswith("1 layer, W4A8: ") and "because" in found["advice"][-1]
    code, _, err = run(capsys, "doctor", "--plan", tmp_path / "none.json")
    assert code == 2 and "cannot be read" in err
