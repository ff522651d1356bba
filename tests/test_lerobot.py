"""A folder that LeRobot trained, as a frozen base: what is refused before LeRobot sees it, and, with it, what it plays.

LeRobot pins another torch, so it lives in an environment of its own; where it is not, its tests are skipped. With it:

    python3.11 -m venv .venv-lerobot
    .venv-lerobot/bin/pip install lerobot==0.4.4 mujoco==3.17.0 gymnasium==1.4.0 scipy==1.15.3 tyro==1.0.17 \
        tensorboard==2.21.0 filelock tqdm imageio imageio-ffmpeg pytest
    .venv-lerobot/bin/python -m pytest tests/test_lerobot.py
"""

import functools
import json
import os
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

import lerobot_policy
import ppo_residual
from base_policies import BaseFlags, joints_to_rad, load_il, make_base, to_lerobot
from env_paper_square import OBS, OBS_DIM, PaperSquareVectorEnv, to_si
from lerobot_policy import LEROBOT_NEEDED, check_lerobot
from runs import UserError, data_of, describe_env, load_checkpoint, load_module, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
STATISTICS = {name: f"policy_{name}processor_step.safetensors" for name in ("pre", "post")}


def safetensors(size=24):
    """The bytes of a safetensors file that holds one tensor of `size` bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def feature(kind, size):
    return {"type": kind, "shape": [size]}


def config(**changes):
    inputs = {"observation.state": feature("STATE", 6), "observation.environment_state": feature("ENV", 15)}
    outputs = {"action": feature("ACTION", 6)}
    return {"type": "act", "n_obs_steps": 1, "input_features": inputs, "output_features": outputs, **changes}


def processor(*steps):
    return {"name": "processor", "steps": list(steps)}


def normalizer(name):
    kind = "normalizer_processor" if name == "pre" else "unnormalizer_processor"
    return {"registry_name": kind, "config": {}, "state_file": STATISTICS[name]}


@pytest.fixture
def folder(tmp_path):
    """A folder that looks as if LeRobot had left it there, as far as one can tell without LeRobot."""
    files = {
        "config.json": config(),
        "policy_preprocessor.json": processor({"registry_name": "to_batch_processor"}, normalizer("pre")),
        "policy_postprocessor.json": processor(normalizer("post")),
        "train_config.json": {"output_dir": "/home/somebody"},
        "README.md": "of no use here",
    }
    folder = tmp_path / "pretrained_model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    for name in ("model.safetensors", *STATISTICS.values()):
        (folder / name).write_bytes(safetensors())
    return folder


def one_line(error):
    assert len(str(error).splitlines()) == 1 and len(str(error)) < 500


def refused(il_checkpoint, message):
    """Building the base is an error of one line that matches."""
    with pytest.raises(UserError, match=message) as error:
        make_base("il", BaseFlags(il_checkpoint=str(il_checkpoint)))
    one_line(error.value)


def load_network(state):
    return load_module(state["script"], "make_network").make_network(state)


# What is refused before LeRobot sees it; runs without LeRobot


def test_a_folder_is_read_as_bytes_that_a_checkpoint_can_hold(folder):
    state = data_of(load_il(str(folder)))
    assert state["script"] == "lerobot_policy"
    assert sorted(state["files"]) == sorted([*LEROBOT_NEEDED, *STATISTICS.values()])  # no train_config.json, no README
    for name, content in state["files"].items():
        assert bytes(content.tolist()) == (folder / name).read_bytes()


def test_a_folder_that_is_none_of_lerobots_is_refused(folder, tmp_path, monkeypatch):
    refused(folder.parent, r"it lacks config\.json, model\.safetensors, .*pretrained_model that lerobot-train wrote")
    refused(folder / "model.safetensors", "is not a checkpoint of this project")
    for name in LEROBOT_NEEDED:
        (folder / name).rename(tmp_path / "aside")
        (folder / name).mkdir()  # a folder where a file should be
        refused(folder, f"it lacks {name}: give the folder")
        (folder / name).rmdir()
        refused(folder, f"it lacks {name}: give the folder")
        (tmp_path / "aside").rename(folder / name)
    (tmp_path / "secret").write_text("{}")
    (folder / "policy_preprocessor_secret.json").symlink_to(tmp_path / "secret")
    refused(folder, "a link out of it")
    (folder / "policy_preprocessor_secret.json").unlink()
    monkeypatch.setattr(lerobot_policy, "LEROBOT_LIMIT", 2**20)
    (folder / "model.safetensors").write_bytes(safetensors(2**21))
    refused(folder, "holds 2 MiB: at most 1 MiB")


NOT_JSON = [b"", b"{", b"[]", b"{}", b'"text"', b'{"type": "act"}', b"\xff", b"[" * 100_000]
NOT_SAFETENSORS = [*(safetensors()[:size] for size in (0, 5, 40, -1)), safetensors() + b"x"]
NOT_SAFETENSORS += [b"\x80\x04pickle" * 9, (2**63).to_bytes(8, "little") + b"{}"]


@pytest.mark.parametrize("name", [*LEROBOT_NEEDED, STATISTICS["pre"]])
def test_a_damaged_file_is_refused(folder, name):
    for content in NOT_JSON if name.endswith(".json") else NOT_SAFETENSORS:
        (folder / name).write_bytes(content)
        refused(folder, "of the LeRobot policy is damaged")


def leaves(content, path=()):
    """The paths of all that is in a content."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


WRONG = [
    None,
    True,
    -1,
    0,
    3,
    10**9,
    -(10**30),
    0.5,
    1e300,
    float("nan"),
    "",
    "x",
    "../../x",
    "a\nb\x1b[2J",
    "x" * 100_000,
]
WRONG += [[], {}, [1], ["x"], [[1.0], [1.0, 2.0]], {"x": 1}]


def test_a_wrong_leaf_is_taken_or_refused_in_one_line(folder):
    files, counts = load_il(str(folder))["files"], Counter()
    for name in files:
        start = 0 if name.endswith(".json") else 8
        original = bytes(files[name].tolist())[start:]
        original, rest = original[: original.rindex(b"}") + 1], original[original.rindex(b"}") + 1 :]
        for path in leaves(json.loads(original)):
            for wrong in WRONG:
                content = json.loads(original)
                *way, last = path
                inner = functools.reduce(lambda part, key: part[key], way, content)
                inner[last] = wrong
                header = json.dumps(content).encode()
                data = len(header).to_bytes(8, "little")[:start] + header + rest
                try:
                    check_lerobot(files | {name: torch.frombuffer(bytearray(data), dtype=torch.uint8)})
                    counts["taken"] += 1
                except UserError as error:
                    one_line(error)
                    counts["refused"] += 1
    assert counts["refused"] > counts["taken"] > 0


def test_a_checkpoint_names_no_other_files_and_chooses_no_other_module(folder):
    state = load_il(str(folder))
    for name in ("../evil.json", "/evil.json", "config.json/../evil.json", "evil.py", "config.json\n"):
        with pytest.raises(UserError, match="not the files of a LeRobot policy"):
            load_network({**state, "files": {**state["files"], name: state["files"]["config.json"]}})
    with pytest.raises(UserError, match=r"there is no .*antigravity\.py"):
        load_network({"script": "antigravity"})
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "smolvla"}, "must be of type act or diffusion, found 'smolvla'"),
        ({"input_features": {"observation.state": feature("STATE", 6)}}, "must have the features .* without --videos"),
        (
            {"input_features": config()["input_features"] | {"observation.images.top": feature("VISUAL", 3)}},
            r"found .*observation\.images\.top.* without --videos",
        ),
        ({"input_features": config()["input_features"] | {"observation.state": feature("STATE", 12)}}, r"\[12\]"),
        ({"output_features": {"action": feature("ACTION", 7)}}, r"\[7\]"),
        ({"type": "diffusion", "noise_scheduler_type": "DDIM", "n_obs_steps": 2}, r"--policy\.n_obs_steps=1"),
        ({"type": "diffusion", "noise_scheduler_type": "DDPM"}, r"--policy\.noise_scheduler_type=DDIM"),
        # for which LeRobot would download a network
        ({"input_features": config()["input_features"] | {"observation.state": feature("VISUAL", 6)}}, "types"),
        # more than any network needs
        ({"dim_model": 10**9}, "dim_model"),
        ({"chunk_size": 10_000}, "chunk_size"),
        ({"n_encoder_layers": 10**6}, "n_encoder_layers"),
        ({"down_dims": [512] * 1000}, "down_dims"),
    ],
)
def test_a_policy_that_cannot_be_played_is_refused(folder, changes, message):
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    refused(folder, message)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"class": "antigravity.Fly"}, r"a processor that is not known here: 'antigravity\.Fly'"),
        ({"registry_name": "tokenizer_processor"}, "not known here: 'tokenizer_processor'"),
        ({}, "not known here: None"),
        ({"registry_name": "normalizer_processor"}, "lacks the statistics of its normalizer_processor: None"),
        (normalizer("pre") | {"state_file": "other.safetensors"}, r"lacks the statistics .*: 'other\.safetensors'"),
        (normalizer("pre") | {"state_file": "../../other.safetensors"}, "lacks the statistics"),
        ({"registry_name": "to_batch_processor", "state_file": "other.safetensors"}, "lacks the statistics"),
    ],
)
def test_a_processor_that_would_import_or_download_is_refused(folder, step, message):
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        original = (folder / name).read_text()
        (folder / name).write_text(json.dumps(processor(step)))
        refused(folder, message)
        (folder / name).write_text(original)


def test_without_lerobot_the_error_says_how_to_get_it(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lerobot", None)  # as if it were not installed
    refused(folder, r"needs LeRobot, 0\.4\.4 or newer")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for script, flag in (("eval.py", "--policy"), ("ppo_residual.py", "--base-policy")):
        monkeypatch.setattr(sys, "argv", shlex.split(f"{script} {flag} il --il-checkpoint {folder}"))
        with pytest.raises(UserError, match="a LeRobot policy needs LeRobot"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert sorted(tmp_path.rglob("*")) == before


# What LeRobot makes of it; skipped without LeRobot

TRAINED = {
    "act": "type=act chunk_size=16 n_action_steps=8 dim_model=32 n_heads=2 dim_feedforward=64",
    "ensemble": "type=act chunk_size=8 n_action_steps=1 temporal_ensemble_coeff=0.1 dim_model=32 n_heads=2",
    "diffusion": "type=diffusion horizon=16 n_action_steps=8 n_obs_steps=1 noise_scheduler_type=DDIM "
    "num_inference_steps=3 down_dims=[16,32]",
}
NORMALIZATION = json.dumps(dict.fromkeys(("STATE", "ENV", "ACTION", "VISUAL"), "MEAN_STD"), separators=(",", ":"))


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Three episodes of record_demos.py."""
    pytest.importorskip("lerobot")
    folder = tmp_path_factory.mktemp("recorded") / "demos"
    command = [sys.executable, str(ROOT / "record_demos.py"), "--num-episodes", "3", "--output-dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, demos, tmp_path_factory):
    """The folder of a policy after three gradient steps of lerobot-train."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    flags = f"{TRAINED[request.param]} push_to_hub=false device=cpu normalization_mapping={NORMALIZATION}"
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_train", f"--output_dir={out}", "--wandb.enable=false"]
    command += ["--dataset.repo_id=local/demos", f"--dataset.root={demos}"]
    command += ["--steps=3", "--batch_size=8", "--num_workers=0", *(f"--policy.{flag}" for flag in flags.split())]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return out / "checkpoints" / "000003" / "pretrained_model"


def load_by_lerobot(folder):
    """LeRobot's policy and its processors, by its own recipe."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    policy = get_policy_class(PreTrainedConfig.from_pretrained(folder).type).from_pretrained(folder)
    pre, post = make_pre_post_processors(
        policy.config, folder, preprocessor_overrides={"device_processor": {"device": "cpu"}}
    )
    return policy, pre, post


def select_action(lerobot, network, observation):
    """LeRobot's own action (6,) for one observation (1, obs_dim), which keeps its own queue; rad."""
    policy, pre, post = lerobot
    parts = to_lerobot(observation, PaperSquareVectorEnv, measured=True)
    state, environment_state = (torch.from_numpy(part[0]) for part in parts)
    batch = pre({"observation.state": state, "observation.environment_state": environment_state})
    noise = {} if policy.config.type == "act" else {"noise": network.noise}
    return joints_to_rad(post(policy.select_action(batch, **noise))[0].numpy())


def test_lerobot_reads_what_record_demos_writes(demos):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from lerobot_dataset import TASK, load_demos

    ours = load_demos(demos)
    names = {"observation.state": "state", "observation.environment_state": "environment_state", "action": "action"}
    dataset = LeRobotDataset("local/demos", root=demos)
    assert (dataset.num_episodes, len(dataset), dataset.fps) == (3, len(ours["state"]), 30)
    starts = np.searchsorted(ours["episode"], np.arange(4))
    for i in range(len(dataset)):
        frame, episode = dataset[i], ours["episode"][i]
        for theirs, name in names.items():
            assert_array_equal(frame[theirs].numpy(), ours[name][i])
        assert (frame["index"], frame["episode_index"], frame["task"]) == (i, episode, TASK)
        assert frame["frame_index"] == i - starts[episode]
        assert abs(frame["timestamp"] - frame["frame_index"] / 30) < 1e-5
        assert frame["next.done"] == (i + 1 == starts[episode + 1])
    for theirs, name in names.items():
        assert_allclose(dataset.meta.stats[theirs]["mean"], ours[name].astype(np.float64).mean(0), rtol=1e-6, atol=1e-9)
        assert_allclose(dataset.meta.stats[theirs]["std"], ours[name].astype(np.float64).std(0), rtol=1e-6, atol=1e-9)
    chunked = LeRobotDataset("local/demos", root=demos, delta_timestamps={"action": [k / 30 for k in range(16)]})
    for i in (0, starts[1] - 3, starts[2] + 1, len(dataset) - 1):  # at an episode's end, its last action again
        rows = i + np.arange(16)
        last = starts[ours["episode"][i] + 1] - 1
        assert_array_equal(chunked[int(i)]["action"].numpy(), ours["action"][np.minimum(rows, last)])
        assert_array_equal(chunked[int(i)]["action_is_pad"].numpy(), rows > last)


def test_a_chunk_is_what_lerobots_own_policy_does(trained):
    network, lerobot = load_network(load_il(str(trained))), load_by_lerobot(trained)
    observations = PaperSquareVectorEnv(3, observe_measured=True).reset(seed=0)[0]
    parts = to_lerobot(observations, PaperSquareVectorEnv, measured=True)
    chunks = network.predict(*map(torch.from_numpy, parts))
    assert chunks.shape == (3, network.chunk_size, 6)
    assert chunks.dtype == torch.float32
    for k, observation in enumerate(observations):
        lerobot[0].reset()
        for step in range(network.n_action_steps):
            action = select_action(lerobot, network, observation[None])
            assert_allclose(joints_to_rad(chunks[k, step].numpy()), action, rtol=0, atol=1e-6)


def test_the_folder_plays_as_lerobot_itself_would(trained):
    """LeRobot's select_action in a loop, as increments: between the targets of a chunk, or from the joint target."""
    policy, lerobot = make_base("il", BaseFlags(il_checkpoint=str(trained)), act_scale=1.0), load_by_lerobot(trained)
    envs = PaperSquareVectorEnv(2, observe_measured=True)
    observations, _ = envs.reset(seed=0)
    policy.reset(np.ones(2, dtype=bool))
    last = np.zeros(6)
    for step in range(2 * policy.network.chunk_size + 3):
        if step == 5:  # the second environment starts an episode, amid the chunk of the first
            policy.reset(np.array([False, True]))
        joint_target = to_si(observations[0])[OBS["joint_target"]]
        action = select_action(lerobot, policy.network, observations[:1])
        since, last = joint_target if step % policy.n_action_steps == 0 else last, action
        actions = policy(observations)
        assert np.abs(actions[0]).max() < 1.0  # not clipped
        assert_allclose(actions[0], action - since, rtol=0, atol=2e-6)
        observations, *_ = envs.step(np.clip(actions / envs.act_scale, -1.0, 1.0))


def test_a_residual_checkpoint_plays_when_the_folder_is_gone(trained, tmp_path):
    folder = trained.rename(tmp_path / "moved")
    try:
        args = ppo_residual.Args(base_policy="il", il_checkpoint=str(folder), observe_measured=True)
        base = make_base("il", args)
        with pytest.raises(UserError, match="add --observe-measured"):
            make_base("il", ppo_residual.Args(base_policy="il", il_checkpoint=str(folder)))
    finally:
        folder.rename(trained)
    observations = PaperSquareVectorEnv(4, observe_measured=True).reset(seed=0)[0]
    expected = base(observations)
    agent = ppo_residual.Agent(OBS_DIM + 6, 6, args.hidden_size, args.init_std)
    checkpoint = {"script": "ppo_residual", "args": asdict(args), "model": agent.state_dict(), "global_step": 0}
    checkpoint |= {"base": base.checkpoint, "env": describe_env(PaperSquareVectorEnv, {"observe_measured": True})}
    save_checkpoint(checkpoint, tmp_path / "last.safetensors")
    state = torch.get_rng_state()
    policy = ppo_residual.make_policy(load_checkpoint(tmp_path / "last.safetensors"))
    assert torch.equal(torch.get_rng_state(), state)
    policy.reset(np.ones(4, dtype=bool))
    assert_array_equal(policy.base_policy(observations), expected)


def edited(state, name, edit):
    """The state with another content of one of its JSON files."""
    content = json.dumps(edit(json.loads(bytes(state["files"][name].tolist())))).encode()
    return {**state, "files": state["files"] | {name: torch.frombuffer(bytearray(content), dtype=torch.uint8)}}


def test_a_policy_trained_on_a_gpu_plays_on_the_cpu(trained):
    state = load_il(str(trained))
    steps = [{"registry_name": "device_processor", "config": {"device": "cuda"}}]
    moved = edited(state, "config.json", lambda config: config | {"device": "cuda"})
    moved = edited(moved, "policy_preprocessor.json", lambda pre: pre | {"steps": steps + pre["steps"]})
    inputs = torch.ones(2, 6), torch.ones(2, 15)
    assert torch.equal(load_network(moved).predict(*inputs), load_network(state).predict(*inputs))


@pytest.mark.parametrize("trained", ["ensemble"], indirect=True)
def test_an_ensemble_coefficient_of_zero_is_the_plain_mean_as_it_is_to_lerobot(trained):
    ensemble = {"n_action_steps": 1, "temporal_ensemble_coeff": 0.0}
    network = load_network(edited(load_il(str(trained)), "config.json", lambda config: config | ensemble))
    assert 0.0 < network.temporal_ensemble_coeff < 1e-6  # here, 0.0 is no ensemble


def test_what_does_not_fit_the_weights_is_refused(trained):
    for name, value in (("dim_model", 64), ("down_dims", [16, 64]), ("horizon", "x"), ("unheard_of", 1)):
        changed = edited(load_il(str(trained)), "config.json", lambda config, new={name: value}: config | new)
        with pytest.raises(UserError, match="LeRobot cannot load the policy") as error:
            load_network(changed)
        one_line(error.value)
