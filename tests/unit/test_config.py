"""Configuration: inheritance, overrides, what is refused and how the refusal reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from soar_mega.config import (
    Config,
    ConfigError,
    FlowMatchingConfig,
    SoarConfig,
    check_world,
    describe_keys,
    dump_yaml,
    load_config,
)
from soar_mega.config.schema import ParallelConfig
from soar_mega.pipeline.schedules import SCHEDULES

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = """\
run: {dir: out}
model: {pretrained: sd35}
objective: {name: soar}
data: {shards: "train-*.tar"}
train: {max_train_steps: 5, micro_batch_size: 2, global_batch_size: 8}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


# --- the files of the repository ---------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_repository_loads(path: Path) -> None:
    overrides = ["run.dir=out", "objective.name=flow_matching", "train.max_train_steps=5"]
    overrides += ["train.micro_batch_size=2", "train.global_batch_size=8"]
    config = load_config(path, overrides if path.stem.endswith("_base") else [])
    if path.stem.startswith("tiny"):
        assert config.precision.compute_dtype == "fp32"
        assert config.train.global_batch_size >= 8


def test_tiny_sft_and_tiny_soar_differ_in_the_objective_only() -> None:
    sft = load_config(CONFIGS / "tiny_sft.yaml").model_dump()
    soar = load_config(CONFIGS / "tiny_soar.yaml").model_dump()
    assert sft.pop("objective") != soar["objective"]
    assert soar.pop("objective")["name"] == "soar"
    assert sft == soar


@pytest.mark.parametrize("model", ["medium", "large"])
def test_each_stage_of_a_chain_starts_from_the_one_before(model: str) -> None:
    pretrain, sft, soar = (
        load_config(CONFIGS / f"sd35_{model}_{stage}.yaml") for stage in ("pretrain", "sft", "soar")
    )
    assert (pretrain.model.init, pretrain.model.init_from) == ("random", None)
    assert sft.model.init_from == pretrain.run.dir
    assert soar.model.init_from == sft.run.dir
    names = [config.objective.name for config in (pretrain, sft, soar)]
    assert names == ["flow_matching", "flow_matching", "soar"]


def test_starting_points_of_the_tiny_configs() -> None:
    starts = {
        name: load_config(CONFIGS / f"tiny_{name}.yaml").model.init
        for name in ("pretrain", "sft", "soar")
    }
    assert starts == {"pretrain": "random", "sft": "pretrained", "soar": "pretrained"}


# --- values ------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_method(minimal: Path) -> None:
    objective = load_config(minimal).objective
    assert isinstance(objective, SoarConfig)
    assert objective.model_dump() == {
        "name": "soar",
        "weighting_scheme": "logit_normal",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "mode_scale": 1.29,
        "shift": None,
        "sigma_grid": "scheduler",
        "cond_dropout_rate": 0.1,
        "min_aux_sigma": 0.00299,
        "lambda_aux": 1.0,
        "aux_states": "rollout",
        "num_rollout_paths": 1,
        "trajectory_length": 6,
        "num_sampling_steps": 40,
        "cfg_scale_sampling": 4.5,
        "sde_rollout_type": "sde",
        "sde_noise_scale": 0.5,
        "sigma_upper_ratio": None,
        "aux_group_size": 1,
        "reuse_base_forward": True,
    }


def test_config_cannot_be_changed(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.max_train_steps = 6  # type: ignore[misc]


def test_overrides_are_yaml_scalars_and_lists_and_later_ones_win(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "optimizer.learning_rate=1e-4",
            "train.max_train_steps=10",
            "train.max_train_steps=20",
            "data.random_flip=true",
            "data.shards=[a-*.tar, b.tar]",
            "run.name='12'",
            "objective.sigma_upper_ratio=null",
            "objective.cfg_scale_sampling=4",
            "validation.prompts=['a: b', c]",
        ],
    )
    assert config.optimizer.learning_rate == 1e-4
    assert config.train.max_train_steps == 20
    assert config.data.random_flip is True
    assert config.data.shards == ("a-*.tar", "b.tar")
    assert config.run.name == "12"
    assert config.validation.prompts == ("a: b", "c")


@pytest.mark.parametrize("glob", ["*.tar", "{00..10}.tar", "a: b", "a #1", "@x", "key=value", "<<"])
def test_an_override_may_hold_characters_that_are_yaml_syntax(minimal: Path, glob: str) -> None:
    assert load_config(minimal, [f"data.shards={glob}"]).data.shards == glob


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.0e-4", ".0001", "0.0001", "10e-5"])
def test_floats_in_all_their_spellings(minimal: Path, text: str) -> None:
    minimal.write_text(MINIMAL + f"optimizer: {{learning_rate: {text}}}\n")
    from_file = load_config(minimal).optimizer.learning_rate
    from_override = load_config(minimal, [f"optimizer.learning_rate={text}"])
    assert from_file == from_override.optimizer.learning_rate == pytest.approx(1e-4, rel=1e-12)


def test_a_section_without_keys_says_nothing(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "logging: # log_every: 10\n")
    assert load_config(minimal).logging.log_every == 1


# --- inheritance -------------------------------------------------------------------------------


def test_bases_merge_deep_in_order_relative_to_their_file(minimal: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "a.yaml").write_text("base: ../minimal.yaml\noptimizer: {adam_beta1: 0.8}\n")
    (folder / "b.yaml").write_text("optimizer: {adam_beta1: 0.7, adam_beta2: 0.95}\n")
    (folder / "c.yaml").write_text("base: [a.yaml, b.yaml]\noptimizer: {weight_decay: 0}\n")
    config = load_config(folder / "c.yaml")
    assert config.optimizer.adam_beta1 == 0.7
    assert config.optimizer.adam_beta2 == 0.95
    assert config.optimizer.weight_decay == 0
    assert config.train.micro_batch_size == 2


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in refusal(tmp_path / "a.yaml")


def test_two_ways_to_the_same_base_are_fine(minimal: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: minimal.yaml\n")
    (tmp_path / "b.yaml").write_text("base: [minimal.yaml, a.yaml]\n")
    assert load_config(tmp_path / "b.yaml") == load_config(minimal)


# --- refusals ----------------------------------------------------------------------------------


def test_unknown_key_in_a_file_names_the_nearest_key_and_the_line(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "optimizer:\n  learnin_rate: 1e-4\n")
    assert refusal(minimal) == (
        f"unknown key optimizer.learnin_rate (from {minimal}, line 7); "
        "did you mean optimizer.learning_rate?"
    )


def test_unknown_key_in_a_base_names_the_base(minimal: Path, tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text("base: minimal.yaml\n")
    minimal.write_text(MINIMAL + "train2: {}\noptimizer: {beta: 1}\n")
    assert f"{minimal}, line 6" not in refusal(tmp_path / "child.yaml")
    minimal.write_text(MINIMAL + "optimizer: {adam_beta: 1}\n")
    assert f"(from {minimal}, line 6)" in refusal(tmp_path / "child.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_train_step=5", "did you mean train.max_train_steps?"),
        ("train.learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("optimiser.learning_rate=1", "did you mean optimizer?"),
        ("objective.lamda_aux=1", "did you mean objective.lambda_aux?"),
        ("run.zzz=1", "run has dir, name, seed"),
    ],
)
def test_unknown_key_in_an_override(minimal: Path, override: str, expected: str) -> None:
    message = refusal(minimal, override)
    assert message.startswith("unknown key " + override.split("=")[0].split(".")[0])
    assert expected in message
    assert f"command line override {override}" in message
    assert "\n" not in message


def test_keys_of_another_objective_are_not_dropped_silently(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("{name: soar}", "{name: soar, lambda_aux: 0.5}"))
    message = refusal(minimal, "objective.name=flow_matching")
    assert "unknown key objective.lambda_aux" in message
    assert "belongs to objective.name = soar, but objective.name = flow_matching" in message
    assert f"{minimal}, line 3" in message
    config = load_config(minimal, ["objective.lambda_aux=0.25"])
    assert isinstance(config.objective, SoarConfig)
    assert config.objective.lambda_aux == 0.25


def test_objective_name_is_checked(minimal: Path) -> None:
    message = refusal(minimal, "objective.name=soa")
    assert "objective.name = 'soa' must be one of flow_matching, soar" in message
    assert "did you mean soar?" in message
    assert "command line override" in message
    minimal.write_text(MINIMAL.replace("{name: soar}", "{shift: 3.0}"))
    assert "objective.name is required" in refusal(minimal)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("train.max_train_steps=0", "greater than or equal to 1"),
        ("train.max_train_steps=five", "valid integer"),
        ("train.max_train_steps=5.5", "valid integer"),
        ("train.max_train_steps=true", "valid integer"),
        ("train.max_grad_norm=.inf", "finite"),
        ("train.ema_decay=1", "less than 1"),
        ("optimizer.learning_rate=.nan", "finite"),
        ("optimizer.learning_rate=fast", "valid number"),
        ("optimizer.lr_scheduler=cosin", "did you mean cosine?"),
        ("data.random_flip=1", "valid boolean"),
        ("data.resolution=72", "multiple of 16"),
        ("data.shards=[]", "at least 1 item"),
        ("data.shards=3", "valid string"),
        ("run.name=7", "in double quotes"),
        ("run.seed=-1", "greater than or equal to 0"),
        ("objective.cond_dropout_rate=1.1", "less than or equal to 1"),
        ("objective.num_sampling_steps=1001", "less than or equal to 1000"),
        ("objective.num_sampling_steps=0", "greater than or equal to 1"),
        ("objective.trajectory_length=-1", "greater than or equal to 0"),
        ("objective.num_rollout_paths=0", "greater than or equal to 1"),
        ("objective.min_aux_sigma=0", "greater than 0"),
        ("objective.min_aux_sigma=1", "less than 1"),
        ("objective.lambda_aux=-0.1", "greater than or equal to 0"),
        ("objective.sigma_upper_ratio=0", "greater than 0"),
        ("objective.shift=0", "greater than 0"),
        ("objective.mode_scale=1.8", "less than or equal to 1.75"),
        ("parallel.tensor_model_parallel_size=0", "greater than or equal to 1"),
        ("checkpoint.checkpoints_total_limit=0", "greater than or equal to 1"),
    ],
)
def test_wrong_value_names_key_value_rule_and_origin(
    minimal: Path, override: str, rule: str
) -> None:
    key = override.split("=")[0]
    message = refusal(minimal, override)
    assert message.startswith(f"{key} = ") or "\n- " in message
    assert rule in message
    assert f"command line override {override}" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.global_batch_size=9"], "nearest that work: 8 or 10"),
        (["train.global_batch_size=1"], "nearest that work: 2"),
        (["data.cache_encoded=true", "data.random_flip=true"], "cannot go with"),
        (["data.cache_encoded=true", "data.random_crop=true"], "cannot go with"),
        (["data.shards=null"], "neither is set"),
        (["data.sources=[{name: a, shards: b}]"], "both are set"),
        (
            ["data.shards=null", "data.sources=[{name: a, shards: b}, {name: a, shards: c}]"],
            "each must be there once",
        ),
        (
            ["data.max_aspect_ratio=2", "data.bucket_group_size=3"],
            "must be a multiple of train.micro_batch_size = 2",
        ),
        (
            ["objective.sde_rollout_type=cps", "objective.sde_noise_scale=1.5"],
            "must be at most 1 with",
        ),
        (["validation.validation_steps=5"], "needs validation.shards"),
        (["validation.image_steps=5"], "needs validation.prompts"),
        (
            ["checkpoint.checkpointing_steps=40", "checkpoint.keep_every_steps=100"],
            "are never saved; use 120",
        ),
        (
            ["checkpoint.checkpointing_steps=40", "checkpoint.keep_best=true"],
            "validation.validation_steps = None must divide checkpoint.checkpointing_steps = 40",
        ),
    ],
)
def test_rules_between_keys(minimal: Path, overrides: list[str], expected: str) -> None:
    message = refusal(minimal, *overrides)
    assert expected in message
    assert f"command line override {overrides[-1]}" in message


def test_group_size(minimal: Path) -> None:
    """One where all pictures have one size; else what is set, or a microbatch."""
    group = "data.bucket_group_size=4"
    assert load_config(minimal, [group]).group_size == 1
    assert load_config(minimal, ["data.max_aspect_ratio=2"]).group_size == 2
    config = load_config(minimal, ["data.max_aspect_ratio=2", group])
    assert config.group_size == 4
    assert check_world(config, 1) == 1
    with pytest.raises(ConfigError, match=r"whole groups of data\.bucket_group_size = 4"):
        check_world(config, 4)


def test_rule_between_keys_says_where_both_came_from(minimal: Path) -> None:
    message = refusal(minimal, "train.global_batch_size=9")
    assert "train.global_batch_size: command line override train.global_batch_size=9" in message
    assert f"train.micro_batch_size: {minimal}, line 5" in message


def test_every_problem_is_told_at_once(minimal: Path) -> None:
    message = refusal(minimal, "train.max_train_steps=0", "run.sed=1")
    assert message.startswith("2 settings are wrong:")
    assert "train.max_train_steps = 0" in message
    assert "did you mean run.seed?" in message


def test_missing_keys_and_sections(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    message = refusal(path)
    assert "objective is required" in message
    path.write_text(MINIMAL.replace("{dir: out}", "{seed: 1}"))
    assert refusal(path).startswith("run.dir is required: Folder of the run")
    assert refusal(path).endswith("run.dir=VALUE")


@pytest.mark.parametrize(
    "override", ["train", "train=5", "=5", "train.=5", "a.b.c=1", "--train.x=1"]
)
def test_what_is_no_override_is_refused(minimal: Path, override: str) -> None:
    message = refusal(minimal, override)
    assert "section.key=value" in message or "unknown key --train" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "must be a mapping of sections"),
        ("train: {x: 1, x: 2}", "'x' stands twice"),
        ("train: 1\nrun: 2\ntrain: 3", "'train' stands twice, in lines 1 and 3"),
        ("base: {a: 1}", "must be a path or a list of paths"),
        ("base: missing.yaml", "missing.yaml does not exist"),
        ("x: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("a: !!int foo", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert expected in refusal(path)


def test_section_that_is_no_mapping_is_refused(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "optimizer: 3\n")
    message = refusal(minimal)
    assert message.startswith("optimizer = 3")
    assert f"{minimal}, line 6" in message


# --- writing back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_pretrain", "tiny_sft", "tiny_soar"])
def test_dump_loads_back_equal(name: str, tmp_path: Path) -> None:
    config = load_config(
        CONFIGS / f"{name}.yaml", ["data.shards=[a, b]", "run.name='1e3'", "run.dir='2026-01-02'"]
    )
    path = tmp_path / "config.resolved.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(path) == config


@settings(max_examples=40, deadline=None)
@given(
    rate=st.floats(min_value=1e-300, max_value=1e300, allow_subnormal=False),
    name=st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable()),
    prompts=st.lists(st.text(min_size=1, max_size=12).filter(str.isprintable), max_size=3),
    seed=st.integers(min_value=0, max_value=2**63 - 1),
)
def test_dump_loads_back_equal_whatever_the_values(
    rate: float, name: str, prompts: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values: dict[str, Any] = yaml.safe_load(MINIMAL)
    values["run"] |= {"name": name, "seed": seed}
    values["optimizer"] = {"learning_rate": rate}
    values["validation"] = {"prompts": prompts}
    config = Config.model_validate(values)
    path = tmp_path_factory.mktemp("dump") / "c.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_every_key_is_described() -> None:
    text = describe_keys()
    for name, field in Config.model_fields.items():
        assert field.description, name
    for line in text.splitlines():
        assert not line.endswith((": ", "None")), line
    for key in SoarConfig.model_fields:
        assert f"objective.{key} (" in text
    assert set(FlowMatchingConfig.model_fields) < set(SoarConfig.model_fields)
    assert "train.micro_batch_size (required; >= 1): " in text
    assert "objective.name (required; flow_matching | soar): " in text


# --- the number of processes -------------------------------------------------------------------


def at(minimal: Path, **changes: int) -> Config:
    places = {"tp": "parallel.tensor_model_parallel_size", "micro": "train.micro_batch_size"}
    places["total"] = "train.global_batch_size"
    return load_config(minimal, [f"{places[key]}={value}" for key, value in changes.items()])


@pytest.mark.parametrize(
    ("changes", "world", "data"),
    [({}, 1, 1), ({}, 4, 4), ({"tp": 2}, 2, 1), ({"tp": 2}, 8, 4), ({"tp": 4, "micro": 8}, 4, 1)],
)
def test_data_parallel_size(minimal: Path, changes: dict[str, int], world: int, data: int) -> None:
    assert check_world(at(minimal, **changes), world) == data


def test_world_that_tensor_parallel_does_not_divide(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(at(minimal, tp=4), 6)
    message = str(caught.value)
    assert "parallel.tensor_model_parallel_size = 4 must divide" in message
    assert "which is 6; use a size of 1, 2, 3, 6, or start 4 or 8 processes" in message


def test_global_batch_that_the_ranks_do_not_divide(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(at(minimal), 3)
    message = str(caught.value)
    assert "train.global_batch_size = 8 must be a multiple of 6" in message
    assert message.endswith("use train.global_batch_size = 6 or 12")
    with pytest.raises(ConfigError, match=r"= 16, or train\.micro_batch_size = 1$"):
        check_world(at(minimal), 8)


@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 24), tp=st.integers(1, 8), micro=st.integers(1, 6), parts=st.integers(1, 9)
)
def test_suggested_batches_work(world: int, tp: int, micro: int, parts: int) -> None:
    values: dict[str, Any] = yaml.safe_load(MINIMAL)
    values["parallel"] = {"tensor_model_parallel_size": tp}
    values["train"] |= {"micro_batch_size": micro, "global_batch_size": micro * parts}
    config = Config.model_validate(values)
    try:
        data = check_world(config, world)
    except ConfigError as error:
        message = str(error)
        if world % tp:
            return
        best = int(message.split("use train.global_batch_size = ")[1].split(",")[0].split()[0])
        values["train"]["global_batch_size"] = best
        assert check_world(Config.model_validate(values), world) == world // tp
        if "or train.micro_batch_size = " in message:
            better = int(message.split("or train.micro_batch_size = ")[1])
            values["train"] |= {"global_batch_size": micro * parts, "micro_batch_size": better}
            assert check_world(Config.model_validate(values), world) == world // tp
    else:
        assert data * tp == world
        assert math.gcd(micro * parts, data * micro) == data * micro


def test_every_schedule_can_be_named() -> None:
    """The config room cannot ask the pipeline room: the names stand twice."""
    field = ParallelConfig.model_fields["pipeline_schedule"]
    assert set(get_args(field.annotation)) == set(SCHEDULES)
