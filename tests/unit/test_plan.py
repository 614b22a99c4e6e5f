"""The plan of a layout: published parameter counts, arithmetic by hand, refusals."""

from __future__ import annotations

import json
import re
import runpy
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from soar_mega.backends.torch import TorchBackend
from soar_mega.checkpoint.errors import CheckpointError
from soar_mega.config import Config, ConfigError, load_config
from soar_mega.model.config import MMDiTConfig
from soar_mega.model.payload import PassSize
from soar_mega.model.stage import MMDiTStage
from soar_mega.parallel.mesh import Mesh
from soar_mega.pipeline.actions import Action, Kind, Placement, Step
from soar_mega.pipeline.schedules import SCHEDULES, build_schedule
from soar_mega.pipeline.simulator import simulate
from soar_mega.pipeline.timeline import Event, Timeline
from soar_mega.telemetry.flops import forward_flops, training_factor
from soar_mega.training import plan_memory
from soar_mega.training.layout import check_layout, cut_model
from soar_mega.training.plan import Plan, make_plan
from soar_mega.training.plan_rank import rank_stages
from soar_mega.training.plan_stages import PassCosts
from soar_mega.training.plan_table import summary, table
from soar_mega.training.plan_times import GPUS, Gpu
from tests.unit.schedule_cases import soar_passes

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ROOT / "configs" / "architectures"
TOOL = ROOT / "tools" / "plan.py"
# As counted in diffusers' own classes.
PUBLISHED = {"sd35_medium": 2243171520, "sd35_large": 8056627520}
SMALL = MMDiTConfig(
    num_layers=4,
    num_attention_heads=4,
    attention_head_dim=16,
    caption_projection_dim=64,
    joint_attention_dim=128,
    pooled_projection_dim=64,
    pos_embed_max_size=12,
)
H200 = GPUS["H200"]


def model_folder(parent: Path) -> Path:
    """A model folder with nothing but the transformer's config."""
    folder = parent / "small" / "transformer"
    folder.mkdir(parents=True)
    body = {"_class_name": "SD3Transformer2DModel", **SMALL.to_diffusers()}
    (folder / "config.json").write_text(json.dumps(body))
    return folder.parent


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return model_folder(tmp_path)


def costs_of(kept: int, held: int) -> PassCosts:
    return PassCosts(kept, held, working=0, split_working=0, forward_sent=0, backward_sent=0)


def configuration(folder: Path, **sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": "nowhere"},
        "model": {"pretrained": str(folder)},
        "objective": {"name": "soar"},
        "data": {"shards": "none", "resolution": 64, "max_sequence_length": 3},
        "train": {"max_train_steps": 1, "micro_batch_size": 2, "global_batch_size": 8},
    }
    for name, content in sections.items():
        values[name] = {**values.get(name, {}), **content}
    return Config.model_validate(values)


def plan_of(folder: Path, gpus: int, gpu: Gpu = H200, **sections: Any) -> Plan:
    return make_plan(configuration(folder, **sections), gpus, gpu)


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline", "schedule"),
    [
        ("sd35_medium", 1, 1, "1f1b"),
        ("sd35_medium", 4, 8, "zero_bubble"),
        ("sd35_medium", 2, 4, "zero_bubble_v"),
        ("sd35_large", 2, 4, "interleaved_1f1b"),
    ],
)
def test_ranks_hold_the_published_parameters(
    name: str, tensor: int, pipeline: int, schedule: str
) -> None:
    config = load_config(
        ROOT / "configs" / "sd35_medium_soar.yaml",
        [
            f"parallel.tensor_model_parallel_size={tensor}",
            f"parallel.pipeline_model_parallel_size={pipeline}",
            f"parallel.pipeline_schedule={schedule}",
        ],
    )
    read = json.loads((ARCHITECTURES / name / "transformer" / "config.json").read_text())
    architecture = MMDiTConfig.from_diffusers(read)
    built = build_schedule(schedule, soar_passes(1), ranks=pipeline, microbatches=1)
    layers, size = cut_model(config, architecture, 1024, 154), PassSize(1, 64, 64, 154)
    ranks = list(rank_stages(config, architecture, built, layers, size, data_size=2))
    assert sum(rank.parameters for rank in ranks) == PUBLISHED[name]
    # Those that are not cut lie on every tensor rank.
    local = sum(rank.local_parameters for rank in ranks)
    assert PUBLISHED[name] / tensor <= local < PUBLISHED[name] / tensor * 1.02


@pytest.mark.parametrize("stage", ["pretrain", "sft", "soar"])
@pytest.mark.parametrize("model", ["medium", "large"])
def test_each_stage_of_the_chain_fits_the_gpus_its_files_name(
    model: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / f"sd35_{model}_{stage}.yaml"
    named = re.search(r"for (\d+) GPUs \((\w+) or H200\)", path.read_text())
    assert named is not None
    plan = make_plan(load_config(path), int(named[1]), GPUS[named[2]])
    assert sum(rank.parameters for rank in plan.ranks) == PUBLISHED[f"sd35_{model}"]
    # The rest is for encoders (T5 takes 10 GB), the CUDA context and the allocator's gaps.
    assert max(memory.peak for memory in plan.memory) < 0.6 * plan.gpu.memory * 1e9
    assert plan.utilisation > 0.2


def test_rank_parameters_are_those_of_the_real_stages(small: Path) -> None:
    parallel = {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zero_bubble_v"}
    plan = plan_of(small, 2, parallel=parallel)
    for rank, stages in ((0, (0, 3)), (1, (1, 2))):
        assert plan.stage_numbers(rank) == list(stages)
        real = [
            MMDiTStage(SMALL, Mesh.single(), TorchBackend(), layers=plan.layers[stage])
            for stage in stages
        ]
        count = sum(p.numel() for module in real for p in module.parameters())
        assert plan.ranks[rank].parameters == plan.ranks[rank].local_parameters == count


def test_flops_and_the_schedules_work_agree(small: Path) -> None:
    """FLOPs by the objective's settings; busy times by its passes, with groups of two sizes."""
    objective = {"aux_group_size": 4, "num_rollout_paths": 1, "trajectory_length": 6}
    parallel = {"pipeline_model_parallel_size": 2}
    plan = plan_of(small, 4, objective=objective, parallel=parallel)
    forward = forward_flops(SMALL, 16, 80)
    assert plan.flops == training_factor(plan.config.objective) * forward * 8 == 22 * forward * 8
    assert {p.states for p in plan.passes} == {1, 2, 4}
    done = sum(plan.timeline.busy) * plan.data_size * 989e12 * plan.efficiency
    assert done == pytest.approx(plan.flops)


def test_full_recomputation_takes_a_forward_more(small: Path) -> None:
    full = plan_of(small, 1, train={"activation_checkpointing": "full"})
    none = plan_of(small, 1)
    assert full.flops == none.flops
    # SOAR: 7 passes with gradient of 22 forwards.
    assert full.timeline.makespan / none.timeline.makespan == pytest.approx((22 + 7) / 22)


def test_bubble_of_equal_stages_is_the_schedules(small: Path) -> None:
    """The numbers in docs/pipeline-schedules.md, for two ranks and two microbatches."""
    documented = {"1f1b": 0.0638, "zero_bubble": 0.0222, "sequential": 0.1373}
    for schedule, bubble in documented.items():
        parallel = {"pipeline_model_parallel_size": 2, "pipeline_schedule": schedule}
        plan = plan_of(small, 2, parallel=parallel, train={"global_batch_size": 4})
        assert plan.microbatches == 2
        assert plan.even_timeline.bubble == pytest.approx(bubble, abs=5e-5)
        assert plan.timeline.bubble > bubble  # the stages are not equal, and messages take time


def test_memory_by_hand(small: Path) -> None:
    """bf16, two data-parallel ranks, every parameter a multiple of 64 elements."""
    plan = plan_of(small, 2, precision={"grad_reduce_dtype": "bf16"})
    D = 64
    block = 4 * (D * D + D) * 2 + 2 * (4 * D * D + 4 * D + 4 * D * D + D) + 12 * (D * D + D)
    last = block - (D * D + D) - (8 * D * D + 5 * D) - 4 * (D * D + D)
    embeddings = 64 * D + D + 128 * D + D + 256 * D + D + 3 * (D * D + D)
    head = 2 * (D * D + D) + D * 64 + 64
    n = 3 * block + last + embeddings + head
    assert plan.ranks[0].parameters == n
    n += 64  # two equal shares that start on borders of 64 elements
    assert n % 128 == 0
    (memory,) = plan.memory
    assert (memory.weights, memory.gradients) == (2 * n, 4 * n)
    assert (memory.master, memory.adam, memory.ema) == (2 * n, 4 * n, 2 * n)
    assert memory.position == 12 * 12 * D * 4
    # The gradients as bf16, the share received, and that in fp32.
    assert memory.reduction == 2 * n + n + 2 * n
    assert memory.encoders == memory.buffers == 0
    states = 14 * n + memory.position
    step = memory.activations + memory.working
    assert memory.peak == states + max(step, memory.reduction)
    assert memory.activations == plan.ranks[0].costs(0).kept


def test_fp32_has_no_second_master_copy(small: Path) -> None:
    one, two = (
        plan_of(small, gpus, precision={"compute_dtype": "fp32"}).memory[0] for gpus in (1, 2)
    )
    assert one.master == two.master == 0
    assert one.weights == one.gradients == one.ema
    assert two.weights == two.gradients == 2 * two.ema
    assert one.reduction == 0
    assert two.reduction == two.weights  # shares of gradient and weights, half each


def test_bytes_of_the_pipeline_by_hand(small: Path) -> None:
    parallel = {"pipeline_model_parallel_size": 2}
    plan = plan_of(small, 2, parallel=parallel)
    payload = (16 + 80 + 1) * 2 * 64 * 2  # image, text, conditioning; 2 rows, width 64, bf16
    latent = 2 * 16 * 8 * 8 * 2
    assert plan.ranks[0].payload_bytes() == payload
    sent = {(x.channel.value, x.source, x.target): (x.messages, x.bytes) for x in plan.traffic}
    assert sent == {
        ("activation", 0, 1): (4 * 8, 4 * 8 * payload),
        ("gradient", 1, 0): (4 * 7, 4 * 7 * payload),
        ("hand_over", 1, 0): (4, 4 * latent),
    }
    # The V brings the last stage back to rank 0: twice the hops, and no hand-over.
    parallel["pipeline_schedule"] = "zero_bubble_v"  # type: ignore[assignment]
    v = plan_of(small, 2, parallel=parallel)
    assert {(x.channel.value, x.source): x.messages for x in v.traffic} == {
        ("activation", 0): 32,
        ("activation", 1): 32,
        ("gradient", 0): 28,
        ("gradient", 1): 28,
    }


def test_bytes_of_data_parallel_ranks(small: Path) -> None:
    plan = plan_of(small, 4)
    n = plan.ranks[0].parameters
    assert plan.reduce_sent(0) == pytest.approx(3 / 4 * 4 * n, rel=1e-3)
    assert plan.gather_sent(0) == pytest.approx(3 / 4 * 2 * n, rel=1e-3)
    times = plan.end_times
    assert times["data_reduce"] == pytest.approx(plan.reduce_sent(0) / 450e9)
    assert plan.step_time == pytest.approx(plan.timeline.makespan + sum(times.values()))


def test_links_leave_the_node_outermost_first() -> None:
    assert [H200.link(ranks)[0] for ranks in (1, 8, 16)] == ["NVLink", "NVLink", "network"]


def test_activations_follow_the_schedule() -> None:
    for name in SCHEDULES:
        schedule = build_schedule(name, soar_passes(3, group=2), ranks=3, microbatches=4)
        timeline = simulate(schedule)
        for rank in timeline.ranks:
            equal = plan_memory.peak_activations(
                timeline, rank, lambda stage, states: costs_of(10 * states, 10 * states)
            )
            live = timeline.peak_live[rank] * schedule.step.placement.chunks
            assert Fraction(equal, 10) == live


def test_activations_are_those_of_the_stages_that_are_live() -> None:
    """A V on one rank with one microbatch: both its stages are live before the first backward."""
    timeline = simulate(build_schedule("zero_bubble_v", soar_passes(0), ranks=1, microbatches=1))
    costs = costs_of(3, 0), costs_of(40, 0)
    assert plan_memory.peak_activations(timeline, 0, lambda stage, _: costs[stage]) == 43


def timeline_of(*actions: tuple[Kind, int]) -> Timeline:
    """Of one rank: kinds and microbatches."""
    step = Step(Placement(1, 1, False), soar_passes(0), microbatches=3)
    events = (Event(Action(kind, "base", n), at, at + 1) for at, (kind, n) in enumerate(actions))
    return Timeline("by hand", step, (tuple(events),))


@pytest.mark.parametrize(
    ("kept", "held", "peak"),
    [
        (10, 10, 30),  # all three, from the last forward on
        (10, 1, 21),  # before the second input backward: 1 + 10 + 10
        (1, 10, 21),  # after the second input backward: 10 + 10 + 1
    ],
)
def test_a_split_backward_keeps_other_bytes_after_it(kept: int, held: int, peak: int) -> None:
    F, I, W = Kind.FORWARD, Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD  # noqa: E741
    timeline = timeline_of(
        *((F, 0), (F, 1), (I, 0), (F, 2), (I, 1), (W, 0), (I, 2), (W, 1), (W, 2))
    )
    costs = costs_of(kept, held)
    assert plan_memory.peak_activations(timeline, 0, lambda *_: costs) == peak
    whole = timeline_of((F, 0), (F, 1), (Kind.BACKWARD, 0), (F, 2), (Kind.BACKWARD, 1))
    assert plan_memory.peak_activations(whole, 0, lambda *_: costs) == 2 * kept


def test_recomputation_saves_little_where_backwards_are_split(small: Path) -> None:
    def activations(schedule: str, recompute: str) -> int:
        parallel = {"pipeline_model_parallel_size": 2, "pipeline_schedule": schedule}
        train = {"activation_checkpointing": recompute}
        plan = plan_of(small, 2, parallel=parallel, train=train)
        return max(memory.activations for memory in plan.memory)

    none, full = (activations("zero_bubble", r) for r in ("none", "full"))
    assert full > 4 * activations("1f1b", "full")
    assert 0.5 * none < full < none < 1.2 * activations("1f1b", "none")


def test_encoders_as_they_are_loaded(tmp_path: Path) -> None:
    """The VAE in fp32, text encoders in the compute dtype, other variants not at all."""
    for part, name, files in (
        ("vae", "diffusion_pytorch_model", ("",)),
        ("text_encoder", "model", ("", ".fp16")),
    ):
        (tmp_path / part).mkdir()
        for variant in files:
            weights = {"a": torch.zeros(3, 5, dtype=torch.float16), "b": torch.zeros(())}
            save_file(weights, tmp_path / part / f"{name}{variant}.safetensors")
    shards = tmp_path / "text_encoder_3"
    shards.mkdir()
    for shard in ("x", "y"):
        save_file({shard: torch.zeros(7)}, shards / f"{shard}.safetensors")
    index = {"weight_map": {"x": "x.safetensors", "y": "y.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    found = plan_memory.encoder_bytes(tmp_path, torch.bfloat16)
    assert found == {"vae": 16 * 4, "text_encoder": 16 * 2, "text_encoder_3": 14 * 2}
    (shards / "y.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match=r"y\.safetensors is no readable"):
        plan_memory.encoder_bytes(tmp_path, torch.bfloat16)


def test_text_tokens_are_those_of_the_clip_tokenizer_and_t5(tmp_path: Path) -> None:
    assert plan_memory.text_tokens(tmp_path, 256) == 77 + 256
    (tmp_path / "tokenizer").mkdir()
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": 20}))
    assert plan_memory.text_tokens(tmp_path, 16) == 20 + 16


def test_fits_is_told_of_the_gpu(small: Path) -> None:
    plan = plan_of(small, 1)
    assert plan.fits
    assert "fits: peak" in table(plan)
    little = plan_of(small, 1, gpu=Gpu("A100", plan.memory[0].peak / 1.01e9, 19.5, 300, 25))
    assert not little.fits
    assert "DOES NOT FIT: peak" in table(little)


def settings_in(message: str) -> list[dict[str, Any]]:
    """The layouts that a refusal names."""
    lines = message.split("that work:\n")[1].splitlines()
    found = [dict(re.findall(r"parallel\.(\w+)=(\S+)", line)) for line in lines]
    return [
        {k: None if v == "null" else int(v) if v.isdigit() else v for k, v in x.items()}
        for x in found
    ]


@pytest.mark.parametrize(
    ("gpus", "parallel", "rule", "first"),
    [
        (8, {"pipeline_model_parallel_size": 3}, "must divide the number of proc", (1, 4)),
        (4, {"tensor_model_parallel_size": 3}, "must divide the number of processes", (4, 1)),
        (8, {"tensor_model_parallel_size": 8}, "must divide the model's width", (4, 1)),
        (8, {"pipeline_model_parallel_size": 8}, "every stage needs at least one", (1, 4)),
        (
            4,
            {"pipeline_model_parallel_size": 2, "pipeline_layout": [3, 2]},
            "its sum is 5 and the model has 4 layers",
            (1, 2),
        ),
        (
            2,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "which takes 1",
            (1, 2),
        ),
    ],
)
def test_refusals_name_rule_and_nearest_layouts(
    small: Path, gpus: int, parallel: dict[str, Any], rule: str, first: tuple[int, int]
) -> None:
    with pytest.raises(ConfigError, match=rule) as refused:
        plan_of(small, gpus, parallel=parallel)
    layouts = settings_in(str(refused.value))
    nearest = layouts[0]
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    assert tuple(nearest[size] for size in sizes) == first
    assert len({tuple(sorted(x.items(), key=str)) for x in layouts}) == len(layouts) <= 5
    for layout in layouts:
        check_layout(configuration(small, parallel={**parallel, **layout}), SMALL, gpus)


def test_refusal_where_no_layout_works(small: Path) -> None:
    with pytest.raises(ConfigError, match="no layout of 5 GPUs works"):
        plan_of(small, 5)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command; its exit code, stdout and stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(TOOL), run_name="__main__")
        return int(left.value.code or 0), *capsys.readouterr()

    return command


def test_command(run: Any, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = configuration(small, parallel={"pipeline_model_parallel_size": 2})
    path.write_text(json.dumps(config.model_dump(mode="json", exclude={"validation"})))
    code, out, _ = run(str(path), "--gpus", "4", "--gpu", "H100")
    assert code == 0
    plan = make_plan(load_config(path), 4, GPUS["H100"])
    assert out == table(plan) + "\n"
    assert "data 2 x pipeline 2 x tensor 1" in out
    assert [line.split()[0] for line in out.split("peak\n")[1].splitlines()[:2]] == ["0", "1"]
    code, out, _ = run(str(path), "train.global_batch_size=4", "--gpus", "4", "--json")
    assert code == 0
    assert json.loads(out)["microbatches"] == 1
    code, out, error = run(str(path), "parallel.pipeline_model_parallel_size=3", "--gpus", "4")
    assert (code, out) == (78, "")
    assert "nearest layouts of 4 GPUs that work" in error
    for wrong in (["--gpu", "V9"], ["--efficiency", "40"], ["data.resolution=1024"]):
        code, out, error = run(str(path), "--gpus", "4", *wrong)
        assert (code, out) == (78, "")
        assert wrong[0].split("=")[0] in error


@pytest.mark.full
def test_documented_output_is_the_commands(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = (ROOT / "docs" / "planning.md").read_text().split("```")
    program, *arguments = blocks[1].split()
    assert program == "tools/plan.py"
    code, out, _ = run(*arguments)
    assert (code, out.strip()) == (0, blocks[3].strip())


def test_json_has_the_tables_numbers(small: Path) -> None:
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    plan = plan_of(small, 8, parallel=parallel)
    body = json.loads(json.dumps(summary(plan)))
    assert body["parameters"] == sum(rank["parameters"] for rank in body["ranks"])
    assert body["layout"]["data"] == 2
    assert f"{body['parameters']:,} parameters" in table(plan)
    for rank in body["ranks"]:
        memory = rank["memory_bytes"]
        assert memory["peak"] > memory["weights"] + memory["gradients"] + memory["activations"]
        assert rank["tensor_sent_bytes"] > 0
    assert body["times_s"]["step"] == pytest.approx(
        sum(time for name, time in body["times_s"].items() if name != "step")
    )
    assert body["samples_per_s"] == pytest.approx(8 / body["times_s"]["step"])
