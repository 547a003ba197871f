"""The benchmark's cases, goals, files and messages; no test depends on a time."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mrcn_fast import benchmark, cli
from mrcn_fast.benchmark import EXACT, Case, Cost, Timing, results, timing, workers
from mrcn_fast.benchmark.suites import kernels, problems
from mrcn_fast.benchmark.suites.problems import OPERATIONS, Problem
from mrcn_fast.benchmark.timing import AUTOTUNED

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")

# Results are only added to: a case's history is found by its name.
FIRST_NAMES = [
    f"block {way} {shape} {layout}"
    for layout in ("nchw", "channels_last")
    for shape in ("16x256x72x32", "16x64x72x32", "8x512x36x16")
    for way in ("forward", "forward+backward")
]


def test_the_names_of_the_cpus_cases_stay() -> None:
    names = [case.name for case in kernels.cases()]
    assert names[:12] == FIRST_NAMES
    assert names[-2:] == [f"cqc{way} forward+backward 4x4x2048" for way in ("", " normalized")]
    assert "block forward 16x256x72x32 nchw bf16" in names
    assert {case.device for case in kernels.cases()} == {"cpu"}


@pytest.mark.parametrize("suite", kernels.SUITES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_name_is_a_case(suite: str, device: str) -> None:
    names = [case.name for case in kernels.cases(suite, device)]
    assert names and len(set(names)) == len(names)


def test_the_stages_are_the_papers() -> None:
    """288 x 128 pixels: behind each stage, for 4 x 4 and 8 x 4 images of a modality."""
    from mrcn_fast.reid.models.resnet import Trunk

    trunk = Trunk(50).eval()
    x = trunk.stem(torch.zeros(1, 3, 288, 128), "visible")
    for stage, expected in enumerate(kernels.STAGES):
        x = trunk.layers(x, stage, stage) if stage else x
        assert tuple(x.shape[1:]) == expected
    shapes = {tuple(case.facts["shape"]) for case in kernels.cases("stages") if "shape" in case.facts}
    assert shapes == {(n, *stage) for n in (16, 32) for stage in kernels.STAGES}


def test_the_sweep_goes_from_a_megabyte_to_a_gigabyte() -> None:
    volumes = [case.facts["volume_bytes"] for case in kernels.cases("sweep")]
    assert min(volumes) < 1e6 and max(volumes) > 1e9
    assert any(case.facts["shape"][0] == 1 for case in kernels.cases("sweep"))


def test_compulsory_volumes() -> None:
    """algebra.md's: 6 and 8 for the pair, 8 with the six sets in one batch, 2 for restitution."""
    assert [OPERATIONS["block"].volumes(way) for way in problems.WAYS] == [6, 8, 14]
    assert OPERATIONS["concat"].volumes("forward") == 8
    assert OPERATIONS["restitution"].volumes("forward") == 2
    assert OPERATIONS["block"].results("forward+backward") == 6


def test_a_gpu_has_cases_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "--device", "cuda", "--dtype", "bf16", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert "gpu block forward+backward 16x64x72x32 channels_last bf16" in names
    assert "gpu block forward 16x64x72x32 channels_last bf16 hot L2" in names
    assert "gpu cqc forward+backward 16x8x2048 bf16" in names
    assert not any(name.endswith("fp32") for name in names)
    assert not {case.name for case in kernels.cases()} & set(names)


@no_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert "nothing to measure: --device cuda: there is no GPU here" in said.err and not said.out


def test_a_name_that_no_case_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "--only", "no such case"]) == 2
    assert "no case's name in the suite table contains" in capsys.readouterr().err


# --- what is compared ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("way", problems.WAYS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_baselines_are_right(operation: str, way: str, dtype: str) -> None:
    """The fused result is the eager one, and the floor moves the compulsory bytes."""
    problem = Problem(operation, way, (2, 8, 5, 4), "channels_last", dtype)
    calls = problems.map_calls(problem)
    benchmark.check(calls, timing.TOLERANCES[problems.DTYPES[dtype]])
    assert (EXACT in calls) == (dtype != "fp32")
    copied = calls["floor"]()
    assert 2 * copied.numel() == OPERATIONS[operation].volumes(way) * 2 * 8 * 5 * 4


@pytest.mark.parametrize("way", problems.WAYS)
def test_large_volumes_are_compared_in_parts(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples at a time give what all eight give, and a wrong sample in the last part is found."""
    problem = Problem("block", way, (8, 4, 5, 4))
    whole = problems.map_calls(problem)["eager"]()
    monkeypatch.setattr(problems, "LARGEST_WITH_BASELINES", problem.volume_bytes * 3 / 8)
    calls = problems.map_calls(problem, with_baselines=False)
    assert set(calls) == {"fused", EXACT, "floor"}
    assert benchmark.largest_error(calls[EXACT](), whole) < 1e-5
    benchmark.check(calls)
    wrong = [tensor.clone() for tensor in calls["fused"]()]
    wrong[0][7] += 1.0
    with pytest.raises(RuntimeError, match="the fused result is off by"):
        benchmark.check(calls | {"fused": lambda: wrong})


def test_other_kernels_are_timed_beside_the_default_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each result is compared before: the reference stands in for a GPU's second backend."""
    assert problems.other_kernels("cpu") == []
    monkeypatch.setattr(problems, "other_kernels", lambda device: ["reference"])
    for calls in (
        problems.map_calls(Problem("block", "forward", (2, 4, 3, 3))),
        problems.cqc_calls(2, 2, 9),
    ):
        assert list(calls)[:2] == ["fused", "fused reference"]
        benchmark.check(calls)
        wrong = [1.5 * tensor for tensor in calls["fused"]()]
        with pytest.raises(RuntimeError, match="the fused reference result is off by"):
            benchmark.check(calls | {"fused reference": lambda wrong=wrong: wrong})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_other_forms_are_right(operation: str) -> None:
    chosen = OPERATIONS[operation]
    torch.manual_seed(0)
    module = chosen.make(8, dtype=torch.float64, backend="reference")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    maps = torch.randn(chosen.inputs, 2, 8, 5, 4, dtype=torch.float64).unbind()
    for form in (chosen.collapsed, chosen.library):
        for plain, other in zip(chosen.call(module, *maps), form(module, *maps), strict=True):
            torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", timing.TOLERANCES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_baselines_of_the_loss_are_right(normalize: bool, dtype: torch.dtype) -> None:
    calls = problems.cqc_calls(3, 2, 33, "cpu", dtype, normalize)
    benchmark.check(calls, timing.TOLERANCES[dtype])
    assert ("unfused" in calls) == normalize
    if dtype == torch.float32:
        for name in calls.keys() - {"fused", "vectorized"}:
            assert benchmark.largest_error(calls[name](), calls["vectorized"]()) < 1e-4


def test_calls_use_their_tensors_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused form and the baseline use the same set at the same call."""
    monkeypatch.setattr(problems, "rotation", lambda device, size: 3)
    for calls in (
        problems.cqc_calls(2, 2, 9),
        problems.map_calls(Problem("block", "backward", (1, 4, 3, 3))),
    ):
        plain = calls.get("vectorized") or calls["eager"]
        rounds = [(calls["fused"](), plain()) for _ in range(4)]
        for fused, expected in rounds:
            assert benchmark.largest_error(fused, expected) < 1e-4
        assert torch.equal(rounds[0][0][0], rounds[3][0][0])
        assert not torch.equal(rounds[0][0][0], rounds[1][0][0])


def test_every_fused_form_is_compared_on_its_own_first_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU there are two, and several sets of tensors that each goes round."""
    monkeypatch.setattr(problems, "rotation", lambda device, size: 3)
    monkeypatch.setattr(problems, "other_kernels", lambda device: ["reference"])
    calls = problems.map_calls(Problem("block", "forward+backward", (1, 4, 3, 3)))
    assert [name for name in calls if name.startswith("fused")] == ["fused", "fused reference"]
    benchmark.check(calls)


def test_a_hot_case_stays_at_one_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "rotation", lambda device, size: 3)
    fused = problems.map_calls(Problem("block", "forward", (1, 4, 3, 3), hot=True))["fused"]
    assert torch.equal(fused()[0], fused()[0])


def test_a_floor_larger_than_its_tensors_moves_all_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "_COPIED_AT_ONCE", 64.0)
    moved: list[int] = []
    copy_ = torch.Tensor.copy_

    def counted(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        moved.append(target.numel())
        return copy_(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    problems.copy_of(2 * 37)()
    assert sum(moved) == 37 and max(moved) == 16


def test_a_wrong_result_is_not_timed() -> None:
    case = Case("wrong", lambda: {"fused": wrong, "eager": right}, {})
    with pytest.raises(RuntimeError, match="the fused result is off by"):
        workers.measured_case(case, 0.0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda first, last: (first, last * float("nan")),
        lambda first, last: (first, last / 0.0),
        lambda first, last: (first, last[:, :1]),
    ],
    ids=["nan", "infinite", "another shape"],
)
def test_a_last_result_that_is_no_result(spoil: Callable[..., Any]) -> None:
    results = torch.ones(2), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="off by inf"):
        benchmark.check({"fused": lambda: spoil(*results), "eager": lambda: results})


def test_a_second_call_that_is_wrong() -> None:
    """Triton's launches go another way from the second call on."""
    calls = iter([right(), wrong()])
    with pytest.raises(RuntimeError, match="at the second call"):
        benchmark.check({"fused": lambda: next(calls), "eager": right})


MISTAKES: dict[str, Callable[[Any], object]] = {
    "gates without weights": lambda block: [torch.nn.init.zeros_(p) for p in block.gate.parameters()],
    "gates of other places": lambda block: [p.copy_(p.roll(1, 0)) for p in block.gate.parameters()],
    "no norm weight": lambda block: torch.nn.init.ones_(block.norm_weight),
    "no norm bias": lambda block: torch.nn.init.zeros_(block.norm_bias),
}


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_the_cases_tell_apart(mistake: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their parameters and maps are such that a block that mistakes one of them is not timed."""

    def call(block: Any, *maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if block.backend != "reference":
            block = copy.deepcopy(block)
            MISTAKES[mistake](block)
        return tuple(block(*maps)[1:5])

    monkeypatch.setitem(OPERATIONS, "block", OPERATIONS["block"]._replace(call=call))
    calls = problems.map_calls(Problem("block", "forward", (2, 32, 9, 8), "nchw", dtype))
    with pytest.raises(RuntimeError, match="the fused result is off by"):
        benchmark.check(calls, timing.TOLERANCES[problems.DTYPES[dtype]])


def test_a_wrong_case_is_told_and_the_next_one_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [sums("first"), sums("wrong", off=1.0), sums("last")]
    monkeypatch.setattr(kernels, "cases", lambda *_: chosen)
    file = tmp_path / "x.jsonl"
    assert cli.main(["bench", "kernels", "--seconds", "0", "--out", str(file)]) == 1
    assert [json.loads(line)["case"] for line in file.read_text().splitlines()] == ["first", "last"]
    assert "wrong: RuntimeError: the fused result is off by" in capsys.readouterr().err


def test_the_fused_form_is_the_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRCN_FAST_BACKEND", "reference")
    assert cli.main(["bench", "kernels", "--only", "16x64x72x32"]) == 2
    assert "MRCN_FAST_BACKEND is 'reference'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "--device", "nothing"], "got --device nothing, expected cpu, cuda or cuda:N"),
        (["show", "--table", "a", "--compare", "b", "c"], "got --table and --compare, expected one of them"),
        (["show"], "got nothing to show, expected one of --table, --compare and --report"),
        (
            ["kernels", "--only", "16x64", "--out", "/dev/null/x"],
            "/dev/null: expected a folder for the results",
        ),
    ],
)
def test_what_can_be_put_right(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_baseline_that_does_not_compile_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def backend(*_: object) -> None:
        raise ValueError("64 v.s. 1024")

    broken = torch.compile(right, backend=backend)
    calls = {"fused": right, "eager": right, "compile": right, "compile collapsed": broken}
    found = workers.measured_case(Case("of two", lambda: dict(calls), {"compile collapsed": 2.0}), 0.0)
    assert found["refused"] == {"compile collapsed": "ValueError('64 v.s. 1024')"}
    assert "compile" in found["ratios"] and "compile collapsed" not in found["ratios"]
    assert found["missed"] == []
    benchmark.print_row(found)
    assert "compile collapsed does not compile: ValueError" in capsys.readouterr().out


def right() -> tuple[torch.Tensor]:
    return (torch.ones(2),)


def wrong() -> tuple[torch.Tensor]:
    return (torch.tensor([1.0, 1.1]),)


# --- memory -------------------------------------------------------------------------------------------------


def test_the_peak_is_what_the_system_counts() -> None:
    def call() -> torch.Tensor:
        scratch = torch.ones(8 << 20)  # 32 MB
        return scratch[: 4 << 20].clone()

    call()
    peak = benchmark.peak_bytes(call)
    if peak is None:
        pytest.skip("this system doesn't tell what a process has at its peak")
    assert 47e6 < peak < 56e6


def test_what_autograd_keeps() -> None:
    """The statistics alone of the block, four bytes a number; of eager six maps."""
    n, c = 2, 32
    calls = problems.map_calls(Problem("block", "forward+backward", (n, c, 9, 8)))
    # Of each plane the mean, what rounding left of it, and 1/σ; the hidden layers of four gates.
    assert 0 < timing.saved_bytes(calls["fused"]) <= 4 * n * (2 * 3 * c + 4 * 2)
    assert timing.saved_bytes(calls["eager"]) > 6 * 4 * n * c * 72
    x = torch.ones(5, requires_grad=True)
    assert timing.saved_bytes(lambda: torch.autograd.grad((x * x).sum(), x)) == 0
    assert timing.saved_bytes(lambda: torch.autograd.grad(x.exp().sum(), x)) == 20


# --- results ------------------------------------------------------------------------------------------------


def result(goals: dict[str, float], host: float = 10.0, floor: float = 0.5, **times: float) -> dict[str, Any]:
    medians = {"fused": 1.0, "floor": floor} | times
    timings = {name: Timing(0.9 * t, t, 1.1 * t) for name, t in medians.items()}
    case = Case("a case", dict, goals, facts={"result_bytes": 100})
    return benchmark.row(case, timings, {name: Cost(host, 103) for name in timings})


@pytest.mark.parametrize(
    ("goals", "settings", "missed"),
    [
        ({"compile": 2.0}, {"compile": 2.1}, []),
        ({"compile": 2.0}, {"compile": 1.9}, ["compile"]),
        ({"compile": 2.0}, {"compile": 2.1, f"compile{AUTOTUNED}": 1.9}, ["compile"]),
        ({"compile": 2.0}, {"compile": 2.2, f"compile{AUTOTUNED}": 2.1}, []),
        ({"compile": 2.0}, {f"compile{AUTOTUNED}": 1.9}, ["compile"]),
        ({"floor": 1.25}, {"floor": 0.81}, []),
        ({"floor": 1.25}, {"floor": 0.79}, ["floor"]),
        ({"host": 40.0}, {"host": 39.0}, []),
        ({"host": 40.0}, {"host": 41.0}, ["host"]),
        ({"memory": 1.04}, {}, []),
        ({"memory": 1.02}, {}, ["memory"]),
    ],
)
def test_goals(goals: dict[str, float], settings: dict[str, float], missed: list[str]) -> None:
    """Of a baseline's two compilations the faster one counts."""
    assert result(goals, **settings)["missed"] == missed


GPU = {"date": "2026", "gpu": "NVIDIA X", "torch": "2.11", "cuda": "13.0", "triton": "3.6.0"}


def test_a_gpus_result_is_printed_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result({}, host=12.3, eager=6.0, compile=2.0)
    assert found["host_us"]["fused"] == 12.3 and found["peak_bytes"]["eager"] == 103
    benchmark.print_row(found)
    printed = capsys.readouterr().out
    assert "host 12 us" in printed and "memory 1.030 of the results'" in printed
    file = tmp_path / "results" / "x.jsonl"
    benchmark.write(file, GPU | result({}, eager=5.0))
    benchmark.write(file, GPU | found)
    assert cli.main(["bench", "show", "--table", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA X, torch 2.11, CUDA 13.0, Triton 3.6.0; 2026" in printed
    assert "| a case | 1000.00 ms | 6.0 × | – | 2.0 × | – | 2.00 |" in printed and "5.0 ×" not in printed


def test_what_moved_between_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def scaled(line: dict[str, Any], by: float, floor: float = 1.0) -> dict[str, Any]:
        ms = {n: [t * (floor if n == "floor" else by) for t in times] for n, times in line["ms"].items()}
        return line | {"ms": ms}

    lines = [result({}) | {"case": name} for name in ("same", "slow", "machine", "fast", "gone")]
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for line, by, floor in zip(lines, (1.1, 1.3, 1.3, 0.8, 1), (1, 1, 1.4, 1, 1), strict=True):
        benchmark.write(files[0], GPU | line)
        if line["case"] != "gone":
            benchmark.write(files[1], GPU | {"gpu": "NVIDIA Y"} | scaled(line, by, floor))
    assert cli.main(["bench", "show", "--compare", *map(str, files)]) == 0
    missing, places, *moved = capsys.readouterr().out.splitlines()
    assert missing == f"not in {files[1]}: gone"
    assert "NVIDIA X" in places and "NVIDIA Y" in places
    assert [line.split("×  ")[1] for line in moved] == [
        "within the spread", "slower", "slower; the floor moved too, 1.40 ×", "faster",
    ]  # fmt: skip


def test_machines_have_tables_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And of each the newest result, whatever the order in the file."""
    file = tmp_path / "x.jsonl"
    cpu = {"cpu": "A", "threads": 2, "torch": "2.13", "pages": "warm"}
    old, new = (cpu | {"kernels": f"C++ kernels, {isa} of ..."} for isa in ("avx2", "avx512bf16"))
    for where, day, ratio in ((new, 3, 2.0), (old, 1, 3.0), (new, 2, 4.0)):
        benchmark.write(file, where | {"date": f"2026-11-0{day}T00"} | result({}, eager=ratio))
    benchmark.write(file, new | {"date": "2026-11-05T00"} | result({}) | {"case": "another"})
    assert cli.main(["bench", "show", "--table", str(file)]) == 0
    printed = capsys.readouterr().out
    first, second = printed.split("A, avx2, ")
    assert first.startswith("A, avx512, 2 threads, torch 2.13, warm pages; 2026-11-03 to 2026-11-05\n")
    assert "| a case | 1000.00 ms | 2.0 ×" in first and "| another |" in first
    assert second.startswith("2 threads, torch 2.13, warm pages; 2026-11-01\n") and "3.0 ×" in second


@pytest.mark.parametrize(
    "content", [None, "", "nothing of ours\n", '{"case": "a"}\n', '{"case": "step", "ms": {"habit": [1]}}\n']
)
def test_a_file_that_holds_no_results(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.jsonl"
    if content is not None:
        file.write_text(content)
    for words in (["--table", str(file)], ["--compare", str(file), str(file)], ["--report", str(file)]):
        assert cli.main(["bench", "show", *words, "--to", str(tmp_path / "report")]) == 2
        assert f"{file}: expected result lines" in capsys.readouterr().err


def test_a_measured_case_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plain forms would be compiled for most of a minute.
    monkeypatch.setattr(problems, "LARGEST_WITH_BASELINES", 0)
    file = tmp_path / "x.jsonl"
    words = ["--suite", "sweep", "--only", "forward 16x64x9x4", "--seconds", "0", "--out", str(file)]
    assert cli.main(["bench", "kernels", *words]) in (0, 1)
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["case"] == "block forward 16x64x9x4 nchw"
    assert set(line["ms"]) == {"fused", "floor"}
    assert line["pages"] in ("warm", "unknown") and line["volumes"] == 6
    assert {"commit", "cpu", "threads", "torch", "date", "peak_bytes"} <= set(line)
    assert "block forward 16x64x9x4 nchw" in capsys.readouterr().out


# --- reports ------------------------------------------------------------------------------------------------


def test_a_report_is_charts_and_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports are drawn with matplotlib")
    from mrcn_fast.benchmark.report import write_report

    where = {"date": "2026", "cpu": "A & B", "threads": 2, "torch": "2.13", "pages": "warm"}
    file = tmp_path / "x.jsonl"
    for count in (1, 2, 4, 8):
        problem = Problem("block", "forward", (count, 8, 6, 4))
        timings = {name: Timing(0.9 * count, count, 1.1 * count) for name in ("fused", "eager", "floor")}
        case = Case(problem.name, dict, {}, facts=problem.facts)
        line = results.row(case, timings, peaks={"fused": 5, "eager": 50})
        results.write(file, where | line)
    written = write_report([file], tmp_path / "report")
    assert [path.name for path in written] == [
        "a-b-2-threads-torch-2.13-warm-pages-speedup.png",
        "a-b-2-threads-torch-2.13-warm-pages-size.png",
        "a-b-2-threads-torch-2.13-warm-pages-memory.png",
        "report.html",
    ]
    page = written[-1].read_text()
    assert page.count("data:image/png;base64,") == 3 and "A &amp; B" in page
    assert "block forward 8x8x6x4 nchw" in page and 'src="http' not in page
    for path in written[:3]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_charts_show_the_fused_form_and_say_what_was_found() -> None:
    pytest.importorskip("matplotlib", reason="reports are drawn with matplotlib")
    from matplotlib.colors import to_hex

    from mrcn_fast.benchmark import report
    from mrcn_fast.benchmark.forms import FORMS

    lines = []
    for shape in ((1, 8, 6, 4), (2, 8, 6, 4), (4, 8, 6, 4), (8, 8, 6, 4), (8, 8, 12, 8)):
        problem = Problem("block", "forward", shape)
        timings = {name: Timing(ms, ms, ms) for name, ms in (("fused", 2.0), ("eager", 6.0), ("floor", 1.0))}
        case = Case(problem.name, dict, {}, facts=problem.facts)
        peaks = {"fused": 2 * problem.result_bytes, "eager": 8 * problem.result_bytes}
        lines.append(results.row(case, timings, peaks=peaks))
    group = report.Group("a machine", lines)
    # Four sizes that differ in the samples alone are a series; the fifth differs in its pixels too.
    (series,) = report.series_of(lines, "forward")
    assert (series.grows, series.fixed, len(series.lines)) == ("samples", "N×8×6×4", 4)
    findings = {
        "speedup": "Times as long as mrcn_fast: eager 3.0 to 3.0 ×",
        "size": "The fused block stays near the floor as the maps grow",
        "memory": "The fused forms need at most 2.00 × the memory of their results",
    }
    for name, draw in report.CHARTS.items():
        figure = draw(group)
        assert figure is not None
        assert [text.get_text() for text in figure.texts] == [findings[name], "a machine"]
        (axes,) = figure.axes
        handles, labels = axes.get_legend_handles_labels()
        fused = handles[labels.index(FORMS["fused"].title)]
        assert to_hex(_color(fused)) == FORMS["fused"].color
        assert "10^" not in axes.get_xaxis().get_major_formatter()(10.0)


def _color(handle: Any) -> Any:
    """The colour of a line or of dots."""
    return handle.get_color() if hasattr(handle, "get_color") else handle.get_facecolor()[0]


# --- a GPU --------------------------------------------------------------------------------------------------


class FakeEvent:
    """A GPU event for which the GPU is the host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.at - self.at)


def test_cases_prepared_side_by_side_are_timed_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second case is wrong: that is reported, and the others have results."""
    chosen = [sums("first"), sums("wrong", off=1.0), sums("gone"), sums("last")]
    monkeypatch.setattr(kernels, "cases", lambda *_: chosen)
    file = tmp_path / "x.jsonl"
    status = cli.main(["bench", "kernels", "--workers", "3", "--seconds", "0.01", "--out", str(file)])
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["first", "last"]
    assert all(line["ms"].keys() == {"fused", "eager"} and line["commit"] for line in lines)
    assert status == 1
    assert "wrong: RuntimeError: the fused result is off by" in printed.err
    assert "gone: the process that prepared it has ended" in printed.err


def sums(name: str, off: float = 0.0) -> Case:
    return Case(name, partial(_sums, name, off), {})


def _sums(name: str, off: float) -> dict[str, Callable[[], Any]]:
    """Here, because another process makes it."""
    if name == "gone":
        os._exit(1)
    x = torch.ones(8)
    return {"fused": lambda: (x + off,), "eager": lambda: (x,)}


def test_cases_are_shared_out_by_how_much_there_is_to_compile() -> None:
    chosen = [sums("forward"), sums("forward+backward"), sums("forward"), sums("forward")]
    assert workers.shared_out(chosen, 2) == [[1, 3], [0, 2]]
    assert workers.shared_out(chosen, 9) == [[1], [0], [2], [3]]


def test_every_round_has_an_order_of_its_own() -> None:
    """None always follows the same one, and pays for what that left in the caches."""
    log: list[str] = []
    calls: timing.Calls = {name: partial(log.append, name) for name in "abcd"}
    timing.measure(calls, 0.0, least=40)
    rounds = [log[k : k + 4] for k in range(8, len(log), 4)]  # behind two calls of each to get ready
    assert len(rounds) == 40 and all(sorted(one) == list("abcd") for one in rounds)
    assert {one.index("a") for one in rounds} == {0, 1, 2, 3}
    before = {one[one.index("a") - 1] for one in rounds if one.index("a") > 0}
    assert before == {"b", "c", "d"}


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_measuring_on_a_gpu(waits: bool, hot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call runs once per round, and behind a pause longer than its host takes, unless it waits itself.

    Before the call other data or the same call fills the cache.
    """
    log: list[str] = []
    fakes: dict[str, Callable[..., Any]] = {
        "Event": FakeEvent,
        "_sleep": lambda cycles: log.append(f"pause {cycles}"),
        "synchronize": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 350,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "pause_rate", lambda: 1e9)
    monkeypatch.setattr(timing, "cache_filler", lambda: lambda: log.append("fill"))

    def eager() -> None:
        time.sleep(2e-3)
        log.append("eager")

    forms: timing.Calls = {"fused": lambda: log.append("fused"), "eager": eager}
    timings, costs = timing.measure_gpu(forms, 0.0, waits, hot, least=3)
    entries = 2 if waits else 3  # of a call: the pause, what is in the cache, the call
    calls = [log[k : k + entries] for k in range(len(log) - 6 * entries, len(log), entries)]
    kinds = [entry[-1] for entry in calls]
    assert [entry[-2] for entry in calls] == (kinds if hot else ["fill"] * 6)
    if not waits:
        pauses = {
            kind: int(entry[0].removeprefix("pause ")) for kind, entry in zip(kinds, calls, strict=True)
        }
        assert pauses["fused"] >= 1e5 and pauses["eager"] >= (2 if hot else 1) * 1e9 * 4e-3
    assert [sorted(kinds[k : k + 2]) for k in (0, 2, 4)] == [["eager", "fused"]] * 3
    assert timings["eager"].median > 1.9e-3 > timings["fused"].median
    assert costs["eager"].host > 1.9e3 and costs["eager"].peak == 250
