"""Upstream's way and ours are measured doing the same."""

import json
from pathlib import Path

import pytest
import torch

from japanese_stable_diffusion.benchmarks import generation
from japanese_stable_diffusion.benchmarks.attempts import ATTEMPTS
from japanese_stable_diffusion.benchmarks.generation import (
    WAYS,
    Job,
    Process,
    compare,
    describe,
    is_installed,
    write,
)
from japanese_stable_diffusion.request import Request

JOB = Job(prompt="富士山", width=64, height=64)


def test_ways_take_turns_at_the_same_things(tiny_weights: Path, tmp_path: Path) -> None:
    report = compare(tiny_weights, ["upstream", "go_fast"], ["evaluate", "make"], JOB, rounds=2)
    turns = [(one["what"], one["way"]) for one in report["measured"]]
    assert (
        turns
        == [("evaluate", "upstream"), ("evaluate", "go_fast")] * 2
        + [
            ("make", "upstream"),
            ("make", "go_fast"),
        ]
        * 2
    )
    evaluations = {one["way"]: one["evaluations"] for one in report["measured"] if one["what"] == "make"}
    assert evaluations["upstream"] == 51
    assert 1 < evaluations["go_fast"] < Request().num_inference_steps
    assert report["flops_per_evaluation"] > 1e6
    assert report["matrix_multiply_flops_per_second"] > 1e8
    assert all(one["seconds"] > 0 and one["peak_bytes"] > 1e7 for one in report["measured"])
    table = describe(report)
    for way in ("upstream", "go_fast"):
        assert sum(way in line for line in table.splitlines()) == 2
    write(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_operations_that_are_known_are_not_counted_again(tiny_weights: Path) -> None:
    report = compare(tiny_weights, ["ours"], ["evaluate"], JOB, rounds=1, flops=10**9)
    assert report["flops_per_evaluation"] == 10**9
    assert "1 GFLOP per evaluation" in describe(report)


@torch.inference_mode()
@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempts_compute_the_same_in_another_way(name: str, tiny_weights: Path) -> None:
    ours, attempt = (WAYS[way](tiny_weights) for way in ("ours", name))
    latents, timestep, text = ours.inputs(JOB)
    expected, found = (way.unet(latents, timestep, text).sample for way in (ours, attempt))
    difference = float((found.float() - expected).norm() / expected.norm())
    # How far off a single number is depends on the order in which a processor adds up; all together hardly
    # do. What is rounded adds up from layer to layer.
    rounding = torch.finfo(torch.bfloat16).eps
    assert rounding / 4 < difference < rounding * 4 if name == "round_to_bfloat16" else difference < 1e-5


def test_a_process_that_dies_is_an_error_and_not_a_wait(tiny_weights: Path) -> None:
    with Process("no switches", tiny_weights) as process, pytest.raises(EOFError):
        process.measure("nothing", JOB)


def test_peers_that_are_not_installed_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generation.PEERS, "openvino", "a_package_that_nobody_has")
    assert not is_installed("openvino")
    assert is_installed("torch.compile") and is_installed("ours")
