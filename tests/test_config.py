"""Every form a configuration may take, and every way in which it may be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import oslo_fusion as oslo
from oslo_fusion import ConfigError, FusionConfig, extension
from oslo_fusion.config import MemoryEfficientFusion, parse_config

OSLO_TUTORIALS: list[dict[str, Any]] = [
    {"kernel_fusion": {"enable": True}},
    {"kernel_fusion": {"enable": True, "memory_efficient_fusion": True}},
    {"kernel_fusion": {"enable": True, "custom_cuda_kernels": ["FusedNoRepeatNGram", "FusedRMSNorm"]}},
]


def test_all_forms_give_the_same(tmp_path: Path) -> None:
    tree = {"kernel_fusion": {"enable": True, "custom_cuda_kernels": ["FusedRMSNorm"], "verify": True}}
    wanted = FusionConfig(enable=True, custom_cuda_kernels=("FusedRMSNorm",), verify=True)
    for ending in ("yaml", "yml"):
        (tmp_path / f"c.{ending}").write_text(OmegaConf.to_yaml(OmegaConf.create(tree)))
    (tmp_path / "c.json").write_text(json.dumps(tree))
    sources: list[Any] = [tree, OmegaConf.create(tree), wanted, {"kernel_fusion": wanted}]
    sources += [tmp_path / "c.yaml", str(tmp_path / "c.yml"), tmp_path / "c.json"]
    sources += [OmegaConf.structured(wanted) and {"kernel_fusion": OmegaConf.to_container(OmegaConf.structured(wanted))}]
    for source in sources:
        assert parse_config(source).fusion == wanted, source


def test_interpolation_is_resolved() -> None:
    tree = OmegaConf.create({"fast": True, "kernel_fusion": {"enable": "${fast}"}})
    assert parse_config(tree).fusion.enable is True


def test_other_blocks_are_left_alone_and_said() -> None:
    parsed = parse_config({"optimizer": {"lr": 1e-3}, "kernel_fusion": {"enable": True}})
    assert "optimizer" in parsed.notes[0]


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        FusionConfig().enable = True  # type: ignore[misc]


@pytest.mark.parametrize("config", OSLO_TUTORIALS)
def test_oslo_tutorial_configs_run_verbatim(config: dict[str, Any], build: Any) -> None:
    model = build("t5")
    assert oslo.initialize(model, config=config) is model
    rows = {row.site.path: row for row in oslo.report(model).rows}
    block = config["kernel_fusion"]
    assert any(row.room == "aot" for row in oslo.report(model).rows) == ("memory_efficient_fusion" in block)
    if "custom_cuda_kernels" in block:
        norm = rows["decoder.final_layer_norm"]
        assert norm.room == "kernels"
        reason = extension.failure()
        assert norm.reason == f"no kernel on the CPU: {reason}" if reason else "float32 16384×64: forward" in norm.reason
        assert rows["generate"].site.kind == "n-gram blocking"


def aot(block: dict[str, Any]) -> dict[str, Any]:
    return {"kernel_fusion": {"enable": True, "memory_efficient_fusion": block}}


def test_memory_efficient_fusion_is_a_switch_or_a_block() -> None:
    assert FusionConfig(enable=True).aot is None
    assert FusionConfig(memory_efficient_fusion=True).aot is None, "enable is false"
    on = parse_config(aot({})).fusion
    assert on == FusionConfig(enable=True, memory_efficient_fusion=True)
    assert on.aot == MemoryEfficientFusion(1.0, "layer")
    block = {"activation_memory_budget": 0, "scope": "model", "replacements": ["package.module:name"], "cuda_graphs": True}
    parsed = parse_config(OmegaConf.create(aot(block))).fusion
    assert parsed.to_dict()["memory_efficient_fusion"] == block
    assert parse_config({"kernel_fusion": parsed.to_dict()}).fusion == parsed


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({}, ["kernel_fusion", "missing", "none"]),
        ({"kernel_fusoin": {"enable": True}}, ["rename kernel_fusoin to kernel_fusion"]),
        ({"enable": True}, ["belong inside the block"]),
        ({"kernel_fusion": {"enable": True}, "verify": True}, ["kernel_fusion.verify", "move it"]),
        ({"kernel_fusion": {}}, ["kernel_fusion", "empty"]),
        ({"kernel_fusion": None}, ["kernel_fusion", "empty"]),
        ({"kernel_fusion": [1]}, ["kernel_fusion", "[1] (list)"]),
        ({"kernel_fusion": True}, ["kernel_fusion", "True (bool)"]),
        ({"kernel_fusion": {"enabel": True}}, ["kernel_fusion.enabel", "did you mean enable?"]),
        ({"kernel_fusion": {"cuda_graphs": True}}, ["kernel_fusion.cuda_graphs", "no room"]),
        ({"kernel_fusion": {"preset": "training"}}, ["kernel_fusion.preset", "no room"]),
        ({"kernel_fusion": {"enable": "yes"}}, ["kernel_fusion.enable", "'yes' (str)", "true or false"]),
        ({"kernel_fusion": {"enable": 1}}, ["kernel_fusion.enable", "1 (int)"]),
        ({"kernel_fusion": {"enable": None}}, ["kernel_fusion.enable", "None"]),
        ({"kernel_fusion": {"padding_free": 1}}, ["kernel_fusion.padding_free", "1 (int)", "true or false"]),
        ({"kernel_fusion": {"paddingfree": True}}, ["did you mean padding_free?"]),
        ({"kernel_fusion": {"memory_efficient_fusion": "yes"}}, ["kernel_fusion.memory_efficient_fusion", "'yes' (str)"]),
        ({"kernel_fusion": {"memory_efficient_fusion": None}}, ["memory_efficient_fusion", "None", "activation_memory_budget"]),
        (aot({"cuda_graphs": 1}), ["kernel_fusion.memory_efficient_fusion.cuda_graphs", "true or false"]),
        (aot({"cuda_graphs": True}), ["kernel_fusion.memory_efficient_fusion.cuda_graphs", "scope: model", "layer now"]),
        (aot({"scope": "layers"}), ["kernel_fusion.memory_efficient_fusion.scope", "layer | model", "did you mean layer?"]),
        (aot({"activation_memory_budget": 1.5}), ["memory_efficient_fusion.activation_memory_budget", "1.5", "0 to 1"]),
        (aot({"activation_memory_budget": 50}), ["50 (int)", "50 % is 0.5"]),
        (aot({"activation_memory_budget": -0.1}), ["-0.1"]),
        (aot({"activation_memory_budget": float("nan")}), ["nan"]),
        (aot({"activation_memory_budget": True}), ["True (bool)"]),
        (aot({"budget": 0.5}), ["memory_efficient_fusion.budget", "unknown key", "activation_memory_budget"]),
        (aot({"replacements": "a:b"}), ["memory_efficient_fusion.replacements", "a list"]),
        (aot({"replacements": ["a.b"]}), ["replacements[0]", "package.module:name"]),
        ({"kernel_fusion": {"custom_cuda_kernels": "FusedRMSNorm"}}, ["custom_cuda_kernels", "a list"]),
        ({"kernel_fusion": {"custom_cuda_kernels": ["FusedRmsNorm"]}}, ["kernels[0]", "did you mean FusedRMSNorm?"]),
        ({"kernel_fusion": {"custom_cuda_kernels": ["FusedRMSNorm", 3]}}, ["kernels[1]", "3 (int)"]),
        ({"kernel_fusion": {"on_refusal": "rise"}}, ["kernel_fusion.on_refusal", "did you mean raise?"]),
        ({"kernel_fusion": {"kernel": "triton2"}}, ["kernel_fusion.kernel", "'triton2' (str)", "did you mean triton?"]),
        ({"kernel_fusion": {"kernel": "c++"}}, ["kernel_fusion.kernel", "auto | triton | cuda"]),
        ({"kernel_fusion": {"kernel": ["cuda"]}}, ["kernel_fusion.kernel", "(list)"]),
        ({"kernel_fusion": {"kernal": "cuda"}}, ["kernel_fusion.kernal", "did you mean kernel?"]),
        ({"kernel_fusion": {"autotune": True}}, ["kernel_fusion.autotune", "off | cached | full"]),
        (OmegaConf.create({"kernel_fusion": {"enable": "???"}}), ["kernel_fusion.enable"]),
        (OmegaConf.create({"kernel_fusion": {"enable": "${nowhere}"}}), ["nowhere"]),
        (None, ["None"]),
        (7, ["7 (int)"]),
        (["kernel_fusion"], ["list"]),
        ("no-such-file.yaml", ["no-such-file.yaml", "no such file"]),
        ("config.toml", ["config.toml", ".yaml"]),
    ],
)
def test_bad_configs_name_key_value_and_remedy(source: object, expected: list[str], build: Any) -> None:
    model = build("gpt2")
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ConfigError) as caught:
        oslo.initialize(model, source)
    for text in expected:
        assert text in str(caught.value)
    assert "Remedy:" in str(caught.value) or "Allowed:" in str(caught.value)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("broken.yaml", "kernel_fusion: {enable: true", "malformed YAML"),
        ("broken.json", '{"kernel_fusion": {"enable": true', "malformed JSON"),
        ("twice.yaml", "kernel_fusion:\n  enable: true\n  enable: false\n", "malformed YAML"),
        ("empty.yaml", "", "missing"),
        ("list.yaml", "- 1\n- 2\n", "instead of a mapping"),
        ("list.json", "[1]", "instead of a mapping"),
        ("quoted.yaml", 'kernel_fusion:\n  enable: "yes"\n', "kernel_fusion.enable"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, expected: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        parse_config(path)
    assert str(path) in str(caught.value)


def test_unreadable_bytes_and_directories_are_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_config(tmp_path / "bytes.yaml")
    for directory in (tmp_path, tmp_path / "d.yaml"):
        directory.mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="is a directory"):
            parse_config(directory)


def test_a_model_that_is_no_module() -> None:
    for thing in (None, "gpt2", lambda x: x):
        with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
            oslo.initialize(thing, {"kernel_fusion": {"enable": True}})
