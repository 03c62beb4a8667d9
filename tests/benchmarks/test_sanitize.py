"""The sanitizer's harness without a GPU: its cases, what it reads out of logs, and that nothing but a clean log is green."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import sanitize

NAMES = ["_rms_norm_fwd_kernel", "_no_repeat_ngram_ban_kernel", "no_repeat_ngram_ban_kernel", "_column_sums_kernel"]

FAULT = {
    "memcheck": """\
========= Invalid __global__ write of size 4 bytes
=========     at _fault_overrun_kernel+0x90 in faults.py:25
=========     by thread (127,0,0) in block (0,0,0)
=========     Address 0x7f5d6a000200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f5d6a000000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: [0x2f3f1a] in libcuda.so.1
=========         Host Frame: launch of _rms_norm_fwd_kernel in nothing.py, which says nothing
=========
""",
    "racecheck": """\
========= Error: Race reported between Write access at _fault_race_kernel+0x110 in faults.py:50
=========     and Read access at _fault_race_kernel+0x120 in faults.py:50 [496 hazards]
=========
""",
    "initcheck": """\
========= Uninitialized __global__ memory read of size 16 bytes
=========     at _fault_uninitialised_kernel+0x70 in faults.py:31
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f5d6a000000
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: [0x2f3f1a] in libcuda.so.1
=========
""",
}
SUMMARY = {
    "memcheck": "========= ERROR SUMMARY: 1 error\n",
    "racecheck": "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n",
    "initcheck": "========= ERROR SUMMARY: 1 error\n",
}
OURS = """\
========= Invalid __global__ read of size 2 bytes
=========     at _rms_norm_fwd_kernel+0x1d0 in rms_norm.py:71
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f5d6a00001a is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: [0x2f3f1a] in libcuda.so.1
=========
"""
CUDA = """\
========= Invalid __global__ write of size 4 bytes
=========     at void <unnamed>::no_repeat_ngram_ban_kernel<long, unsigned int>(T2 *, long, long, long, long, T1)+0x2a0
=========     by thread (0,0,0) in block (0,0,0)
=========
"""
THEIRS = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::native::FillFunctor<float>>(int, T2, T3)+0x70
=========     by thread (0,0,0) in block (0,0,0)
=========
"""


def log(tool, *reports, fault=True, summary=None):
    parts = ["========= COMPUTE-SANITIZER\n", *reports, FAULT[tool] if fault else ""]
    return "".join(parts) + (SUMMARY[tool] if summary is None else summary)


# --- logs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_the_fault_alone_is_clean(tool):
    found = sanitize.read_log(log(tool), NAMES, tool)
    assert (found.fault, dict(found.ours), dict(found.others), found.errors) == (1, {}, {}, 1)
    assert sanitize.verdict(found, True, False) == "clean"


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_a_tool_that_sees_nothing_is_not_clean(tool):
    summary = SUMMARY[tool].replace(": 1", ": 0")
    found = sanitize.read_log(log(tool, fault=False, summary=summary), NAMES, tool)
    assert found.errors == 0
    assert sanitize.verdict(found, True, False) == "red: the fault that was put in was not reported"


def test_reports_are_attributed():
    found = sanitize.read_log(log("memcheck", OURS, OURS, CUDA, THEIRS), NAMES, "memcheck")
    assert dict(found.ours) == {"_rms_norm_fwd_kernel": 2, "no_repeat_ngram_ban_kernel": 1}
    assert found.others == {"Uninitialized __global__ memory read of size 4 bytes": 1}
    assert found.fault == 1
    assert "rms_norm.py:71" in found.examples[0]
    assert sanitize.verdict(found, True, False) == "red: _rms_norm_fwd_kernel ×2, no_repeat_ngram_ban_kernel ×1"


def test_a_race_names_its_kernel_in_either_half():
    race = FAULT["racecheck"].replace("_fault_race_kernel", "_column_sums_kernel")
    older = race.replace("=========     and Read", "========= and Read")
    for text in (race, older):
        found = sanitize.read_log(log("racecheck", text), NAMES, "racecheck")
        assert dict(found.ours) == {"_column_sums_kernel": 1}
        assert not found.others


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("at _no_repeat_ngram_ban_kernel+0x10", "_no_repeat_ngram_ban_kernel"),
        ("void (anonymous namespace)::no_repeat_ngram_ban_kernel<long>(int)", "no_repeat_ngram_ban_kernel"),
        ("_ZN12_GLOBAL__N_126no_repeat_ngram_ban_kernelIlEEvi", "no_repeat_ngram_ban_kernel"),
        ("at::native::layer_norm_kernel", None),
    ],
)
def test_owner(text, name):
    assert sanitize.owner(text, NAMES) == name


def test_what_is_no_report():
    text = """\
========= COMPUTE-SANITIZER
some line of the program
========= Target application returned an error
========= ERROR SUMMARY: 0 errors
"""
    found = sanitize.read_log(text, NAMES, "memcheck")
    assert not found.others
    assert found.summary == "ERROR SUMMARY: 0 errors"


def test_a_log_that_breaks_off_keeps_what_it_has():
    found = sanitize.read_log(log("memcheck", OURS, fault=False, summary=""), NAMES, "memcheck")
    assert found.summary is None
    assert found.ours["_rms_norm_fwd_kernel"] == 1


@pytest.mark.parametrize(
    ("finished", "stopped", "said"),
    [
        (False, True, "lack of time"),
        (False, False, "not every case ran"),
        (True, True, "lack of time"),
        (True, False, "no summary"),
    ],
)
def test_what_did_not_finish_is_red(finished, stopped, said):
    found = sanitize.read_log(log("memcheck", summary=""), NAMES, "memcheck")
    assert said in sanitize.verdict(found, finished, stopped)
    assert sanitize.verdict(found, finished, stopped).startswith("red")


def test_version():
    text = "NVIDIA (R) Compute Sanitizer\nCopyright (c) 2020-2025\nVersion 2025.3.1.0 (build 36398880) (public-release)\n"
    assert sanitize.version(text) == "2025.3.1.0"
    assert sanitize.version("") is None


# --- cases ----------------------------------------------------------------------------------------------------------


def test_every_case_obeys_the_law_on_the_cpu():
    found = sanitize.verify(torch.device("cpu"))
    assert len(found["cases"]) == len(set(found["cases"])) >= 19
    text = "\n".join(found["cases"])
    for piece in (
        "1×13",
        "3×1025",
        "2×4097",
        "strided rows",
        "strided numbers",
        "unaligned",
        "no_repeat_ngram",
        ", residual",
    ):
        assert piece in text


def test_running_a_case_leaves_its_inputs():
    for case in sanitize.cases(False):
        before = [t.clone() for t in case.inputs]
        case.results(torch.device("cpu"))
        assert all(torch.equal(a, b) for a, b in zip(before, case.inputs, strict=True)), case.name


def test_cuda_adds_cases_and_kernels():
    more = {case.name for case in sanitize.cases(True)} - {case.name for case in sanitize.cases(False)}
    assert any(name.startswith("no_repeat_ngram in cuda") for name in more)
    triton, everything = sanitize.kernel_names(False), sanitize.kernel_names(True)
    assert {"_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel", "_column_sums_kernel", "_layer_norm_bwd_kernel"} <= set(triton)
    assert all(name.startswith("_") for name in triton)
    assert {"no_repeat_ngram_ban_kernel", "no_repeat_ngram_copy_kernel"} <= set(everything) - set(triton)


def test_kernels_are_found_however_they_are_decorated(monkeypatch, tmp_path):
    triton, csrc = tmp_path / "oslo_fusion" / "triton", tmp_path / "oslo_fusion" / "csrc"
    triton.mkdir(parents=True)
    csrc.mkdir()
    (triton / "a.py").write_text(
        "@triton.jit\ndef _helper(x):\n    pass\n\n\n"
        "@triton.jit(do_not_specialize=_VARYING)\ndef _one_kernel(x):\n    pass\n\n\n"
        "@triton.jit(\n    do_not_specialize=[\n        'x',\n    ]\n)\ndef _two_kernel(\n    x,\n):\n    pass\n\n\n"
        "def plain_kernel(x):\n    pass\n"
    )
    (csrc / "a.cu").write_text(
        "template <typename T>\n__global__ void __launch_bounds__(kThreads)\n    three_kernel(T* x) {}\n"
        "__global__ void four_kernel(int* x) {}\n__global__ __launch_bounds__(128, 2) void five_kernel() {}\n"
    )
    monkeypatch.setattr(sanitize, "ROOT", tmp_path)
    assert sanitize.kernel_names(False) == ["_one_kernel", "_two_kernel"]
    assert sanitize.kernel_names(True) == ["_one_kernel", "_two_kernel", "three_kernel", "four_kernel", "five_kernel"]


def test_a_kernel_is_chosen_on_a_gpu_only():
    class Somewhere:
        def __init__(self, is_cuda):
            self.is_cuda = is_cuda

    def choosing(x, weight=None, *, kernel="auto"):
        return kernel, weight

    chosen = sanitize._chosen(choosing, "cuda")
    assert chosen(Somewhere(True), 1) == ("cuda", 1)
    assert chosen(Somewhere(False), weight=2) == ("auto", 2)
    assert sanitize._chosen(len, "cuda") is len


def test_an_operation_that_is_not_there_gives_no_case():
    assert sanitize._find("nothing_of_this_name", "f") is None
    assert sanitize._find("rms_norm", "nothing_of_this_name") is None
    assert sanitize._find("rms_norm", "rms_norm") is not None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_faults_compile_and_are_called_what_the_harness_expects(tool):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks import faults

    assert set(faults.COMMIT) == set(sanitize.TOOLS)
    kernel = getattr(faults, sanitize.FAULTS[tool])
    types = {name: "constexpr" if name == "BLOCK" else "*i32" for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs={"BLOCK": faults.NUMBERS})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert ("st.volatile.shared" in built.asm["ptx"]) == (tool == "racecheck")
    assert built.metadata.name == sanitize.FAULTS[tool]


# --- the command line -------------------------------------------------------------------------------------------------


def test_without_the_program_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main([]) == 2
    assert "no compute-sanitizer here" in capsys.readouterr().err


def test_finds_the_program_where_cuda_puts_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").write_text("")
    assert sanitize.find_sanitizer() == str(tmp_path / "bin" / "compute-sanitizer")


@pytest.mark.parametrize("tools", ["memchek", ","])
def test_bad_tools(tools, capsys):
    assert sanitize.main(["--tools", tools]) == 2
    assert "--tools" in capsys.readouterr().err


def test_command():
    for tool in sanitize.TOOLS:
        words = sanitize.command("cs", tool, NAMES, Path("log"), Path("report"))
        assert words[:3] == ["cs", "--tool", tool]
        filters = [word for word in words if word.startswith("kns=")]
        assert (f"kns={sanitize.FAULTS[tool]}" in filters) == (tool != "initcheck")
        assert words[words.index("-m") + 1] == "benchmarks.sanitize"
        assert words[-2:] == ["--fault", tool]


class Machine:
    """Stands for the processes: writes what they would."""

    def __init__(self, logs, launches=3, code=0):
        self.logs, self.launches, self.code, self.seconds = logs, launches, code, []

    def start(self, words, seconds):
        self.seconds.append(seconds)
        report = Path(words[words.index("--child") + 1])
        if "--tool" not in words:
            report.write_text(json.dumps({"cases": ["a", "b"], "launches": dict.fromkeys(NAMES, self.launches)}))
            return self.code, "text of the process"
        Path(words[words.index("--log-file") + 1]).write_text(self.logs[words[words.index("--tool") + 1]])
        report.write_text(sanitize.DONE)
        return 1, "text of the process"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    def run(*arguments, **settings):
        made = Machine({tool: log(tool) for tool in sanitize.TOOLS} | settings.pop("logs", {}), **settings)
        monkeypatch.setattr(sanitize, "find_sanitizer", lambda: "true")
        monkeypatch.setattr(sanitize.models, "parse_device", lambda device: torch.device("cpu"))
        monkeypatch.setattr(sanitize, "_start", made.start)
        code = sanitize.main(["--out", str(tmp_path), *arguments])
        found = [json.loads(path.read_text()) for path in tmp_path.glob("sanitizer-*.json")]
        return code, found[0] if found else None, made

    return run


def test_clean_run(machine, capsys):
    code, found, made = machine("--commit", "abc")
    assert code == 0
    assert [row["verdict"] for row in found["tools"]] == ["clean"] * 3
    assert all(row["fault_caught"] and row["errors_of_ours"] == 0 for row in found["tools"])
    assert found["launches"] == dict.fromkeys(NAMES, 3)
    assert found["commit"]["id"] == "abc"
    assert sum(made.seconds[1:]) > sanitize.SECONDS, "each tool may use what the others have left"
    printed = capsys.readouterr().out
    assert "2 cases, 12 launches of 4 kernels" in printed
    assert "fault caught" in printed


def test_red_run(machine, capsys):
    code, found, _ = machine("--tools", "memcheck", logs={"memcheck": log("memcheck", OURS)})
    assert code == 1
    (row,) = found["tools"]
    assert row["errors_of_ours"] == 1
    assert "rms_norm.py:71" in capsys.readouterr().out


def test_a_kernel_that_no_case_launches_is_red(machine, capsys):
    code, found, _ = machine(launches=0)
    assert code == 1
    assert found["not_launched"] == NAMES
    assert "no case launches _rms_norm_fwd_kernel" in capsys.readouterr().out


def test_cases_that_fail_without_the_sanitizer_stop_it(machine, capsys):
    code, found, made = machine(code=1)
    assert (code, found, len(made.seconds)) == (1, None, 1)
    assert "text of the process" in capsys.readouterr().err


def test_time_limit_ends_the_process():
    code, _ = sanitize._start(["sleep", "60"], 0.1)
    assert code is None
    assert sanitize._start(["sh", "-c", "echo $PYTORCH_NO_CUDA_MEMORY_CACHING; exit 3"], 20.0) == (3, "1\n")
