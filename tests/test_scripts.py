"""The training script and eval.py: algorithm, checkpoints, bad input, README."""

import ast
import json
import pickle
import re
import runpy
import shlex
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as evaluation
import ppo_residual
from base_policies import JacobianIKPolicy
from env_paper_square import OBS_DIM
from ppo_residual import Agent, Args, ResidualPolicy, compute_gae

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"ppo_residual.py": ppo_residual.Args, "eval.py": evaluation.Args}
TINY = (
    "--total-timesteps 32 --num-envs 2 --num-steps 8 --minibatch-size 8 --update-epochs 1 "
    "--eval-episodes 1 --test-episodes 1 --eval-freq 1000"
)


def run_script(name, flags, monkeypatch, folder):
    """Run a script as `python name flags` would, in `folder`; returns its globals."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(flags)])
    return runpy.run_path(str(ROOT / name), run_name="__main__")


def fresh_agent():
    torch.manual_seed(0)
    return Agent(OBS_DIM + 6, 6, 64, 0.5)


def test_gae_is_the_discounted_sum_of_td_errors():
    torch.manual_seed(0)
    num_steps, gamma, lam = 7, 0.9, 0.8
    rewards, values = torch.randn(num_steps, 1), torch.randn(num_steps, 1)
    dones, next_value = torch.zeros(num_steps, 1), torch.randn(1)
    dones[3] = 1.0
    advantages, returns = compute_gae(rewards, values, dones, next_value, gamma, lam)
    following = torch.cat([values[1:], next_value[None]])
    for t in range(num_steps):
        expected, weight = 0.0, 1.0
        for k in range(t, num_steps):
            expected += weight * (rewards[k] + gamma * following[k] * (1 - dones[k]) - values[k])
            weight *= gamma * lam
            if dones[k]:
                break
        torch.testing.assert_close(advantages[t], expected)
    torch.testing.assert_close(returns, advantages + values)


class ToyVectorEnv(VectorEnv):
    """Environment 0 is truncated after 2 steps, environment 1 terminates after 3; obs[0] counts the steps."""

    def __init__(self, num_envs, **kwargs):
        self.num_envs, self.tape_half_size = num_envs, 0.08
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_action_space = gym.spaces.Box(-1, 1, (6,), np.float32)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    def observe(self):
        obs = np.zeros((2, OBS_DIM), dtype=np.float32)
        obs[:, 0], obs[:, 1] = self.steps, [0, 1]
        return obs

    def reset(self, *, seed=None, options=None):
        self.steps = np.zeros(2)
        return self.observe(), {}

    def step(self, actions):
        self.steps += 1
        truncations, terminations = self.steps * [1, 0] == 2, self.steps * [0, 1] == 3
        done, obs, rewards = truncations | terminations, self.observe(), 10.0 * self.steps
        infos = {"reward/toy": rewards}
        if done.any():
            final_obs = np.full(2, None, dtype=object)
            for i in np.flatnonzero(done):
                final_obs[i] = obs[i]
            final_info = {"dist_to_goal": np.zeros(2), "orientation_error": np.zeros(2)}
            infos |= {"final_obs": final_obs, "final_info": final_info}
            self.steps[done] = 0
        return self.observe(), rewards, terminations, truncations, infos


def test_rollout_stores_whole_transitions_and_bootstraps_truncation_only(monkeypatch, tmp_path):
    spec = gym.registry["PaperSquare-v0"]
    monkeypatch.setattr(spec, "vector_entry_point", ToyVectorEnv)
    flags = TINY.replace("timesteps 32", "timesteps 12").replace("num-steps 8", "num-steps 6")
    flags = flags.replace("minibatch-size 8", "minibatch-size 12")
    flags += " --base-policy zero --learning-rate 1e-12 --residual-penalty 0 --gamma 0.9 --reward-scale 0.1"
    script = run_script("ppo_residual.py", flags, monkeypatch, tmp_path)
    obs, rewards, dones = script["obs"], script["rewards"], script["dones"]
    assert obs[:, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert obs[:, 1, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert dones[:, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert dones[:, 1].tolist() == [0, 0, 1, 0, 0, 1]
    final_x = torch.zeros(1, OBS_DIM + 6)
    final_x[0, 0] = 2.0  # the observation that the truncated episode ended with, not the next episode's first
    with torch.no_grad():
        last_value = script["agent"].get_value(final_x).item()
    expected = [1, 2 + 0.9 * last_value] * 3
    np.testing.assert_allclose(rewards[:, 0].numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(rewards[:, 1].numpy(), [1, 2, 3, 1, 2, 3], rtol=1e-6)


def test_fresh_residual_is_the_base_action_for_action():
    base = JacobianIKPolicy()
    policy = ResidualPolicy(fresh_agent(), JacobianIKPolicy(), 0.5, base_input=True)
    seeds = range(7, 13)
    alone, corrected = (evaluation.play_episodes(p, seeds, {}) for p in (base, policy))
    for name in ("success", "return", "length", "final_distance_m", "final_yaw_error_rad"):
        np.testing.assert_array_equal(alone[name], corrected[name])


def test_episodes_do_not_depend_on_the_number_of_environments():
    one, many = (evaluation.play_episodes(JacobianIKPolicy(), range(5), {}, num_envs=n) for n in (2, 5))
    for name in ("seed", "success", "return", "length"):
        np.testing.assert_array_equal(one[name], many[name])


def test_the_residual_is_scaled_by_alpha_and_clipped():
    agent = fresh_agent()
    torch.nn.init.constant_(agent.actor_mean[-1].bias, 5.0)  # beyond its bounds
    obs = np.random.default_rng(0).normal(size=(4, OBS_DIM)).astype(np.float32)
    base = JacobianIKPolicy()
    for alpha in (0.0, 0.3, 1.0):
        policy = ResidualPolicy(agent, base, alpha, base_input=True)
        np.testing.assert_allclose(policy(obs), np.clip(base(obs) + alpha, -1, 1), atol=1e-6)
        assert np.all(policy.residual_action == 1.0)


def test_checkpoint_alone_rebuilds_the_policy(monkeypatch, tmp_path):
    script = run_script(
        "ppo_residual.py", f"{TINY} --alpha 0.4 --ik-gain 0.4 --learning-rate 0.1", monkeypatch, tmp_path
    )
    last = next(tmp_path.glob("runs/*/last.pt"))
    checkpoint = evaluation.load_checkpoint(last)
    assert checkpoint["global_step"] == 32
    policy = ppo_residual.make_policy(checkpoint)
    assert policy.base_policy.gain == 0.4 and policy.alpha == 0.4
    before = next(value for name, value in script["policies"].items() if name.startswith("residual"))
    in_process, from_file = (evaluation.play_episodes(p, range(3), {}) for p in (before, policy))
    for name in ("success", "return", "length", "residual_norm"):
        np.testing.assert_array_equal(in_process[name], from_file[name])
    assert in_process["residual_norm"].min() > 0


def test_a_run_writes_what_the_readme_says(monkeypatch, tmp_path):
    run_script("ppo_residual.py", TINY, monkeypatch, tmp_path)
    (run_dir,) = tmp_path.glob("runs/*")
    assert {"args.json", "best.pt", "last.pt", "results.json"} <= {path.name for path in run_dir.iterdir()}
    assert json.loads((run_dir / "args.json").read_text())["num_envs"] == 2
    events = EventAccumulator(str(run_dir)).Reload()
    readme = (ROOT / "README.md").read_text()
    for key in events.Tags()["scalars"]:
        assert f"`{key}`" in readme or f"`{key.split('/')[0]}/<" in readme, f"{key} is not in the README's table"


FLAGS = {
    "--base-policy zero --no-base-input --alpha 1 --no-anneal-lr": 1.0,
    "--base-policy hybrid --hybrid-mode switch --hybrid-weights 0.7 0.3 --curriculum": 0.5,
    "--alpha-schedule linear --no-randomize --capture-video": 0.3 + 0.5 * 0.7,  # the second of two iterations
}


@pytest.mark.parametrize("flags", FLAGS)
def test_other_flags_run_too(flags, monkeypatch, tmp_path):
    if "--capture-video" in flags:
        try:
            evaluation.check_rendering()
        except RuntimeError as error:
            pytest.skip(str(error))
    script = run_script("ppo_residual.py", f"{TINY} {flags}", monkeypatch, tmp_path)
    checkpoint = evaluation.load_checkpoint(next(tmp_path.glob("runs/*/last.pt")))
    assert checkpoint["alpha"] == pytest.approx(FLAGS[flags])
    assert script["envs"].tape_half_size == pytest.approx(0.08)
    ppo_residual.make_policy(checkpoint)
    if "--capture-video" in flags:
        assert list(tmp_path.glob("runs/*/episode.mp4"))


def test_track_without_wandb_is_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(SystemExit) as end:
        run_script("ppo_residual.py", f"{TINY} --track", monkeypatch, tmp_path)
    assert end.value.code == 2 and "wandb" in capfd.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", [1, 2])
def test_same_seed_same_weights_whatever_the_threads(monkeypatch, tmp_path, threads):
    runs = []
    for count in (1, threads):
        flags = f"{TINY} --num-threads {count} --seed 3"
        runs.append(run_script("ppo_residual.py", flags, monkeypatch, tmp_path)["agent"].state_dict())
        for folder in tmp_path.glob("runs/*"):
            folder.rename(tmp_path / f"done-{len(runs)}")
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


BAD_INPUT = {
    "--alpha 1.5": "alpha",
    "--alpha -0.1": "alpha",
    "--minibatch-size 1000": "minibatch",
    "--total-timesteps 10": "total-timesteps",
    "--base-policy il --il-checkpoint nowhere.pt": "il",
    "--base-policy hybrid --hybrid-bases jacobian nothing": "nothing",
    "--base-policy hybrid --hybrid-weights 1.0": "weight",
    "--base-policy magic": "magic",
    "--eval-episodes 0": "eval-episodes",
    "--learning-rate 0": "learning-rate",
    "--learning-rate nan": "learning-rate",
    "--num-envs 0": "num_envs",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_writes_nothing(flags, monkeypatch, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        run_script("ppo_residual.py", flags, monkeypatch, tmp_path)
    captured = capfd.readouterr()
    assert end.value.code == 2
    assert BAD_INPUT[flags] in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unwritable_output_folder(monkeypatch, tmp_path, capfd):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(SystemExit) as end:
        run_script("ppo_residual.py", TINY, monkeypatch, tmp_path)
    assert end.value.code == 2 and capfd.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        run_script("eval.py", "--policy zero --output-dir runs/here", monkeypatch, tmp_path)
    assert end.value.code == 2 and capfd.readouterr().err.count("\n") == 1


class Hostile:
    def __reduce__(self):
        return (Path("executed").touch, ())


def test_foreign_checkpoints_are_refused_in_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    Path("garbage.pt").write_bytes(b"not a checkpoint")
    Path("empty.pt").touch()
    Path("hostile.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"model": {}}, "other.pt")
    for name in ("garbage.pt", "empty.pt", "hostile.pt", "other.pt", "missing.pt"):
        with pytest.raises(SystemExit) as end:
            run_script("eval.py", f"--model-path {name}", monkeypatch, tmp_path)
        error = capfd.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and name in error and error.count("\n") == 1
    assert not Path("executed").exists() and not Path("eval_results").exists()
    with pytest.raises(SystemExit) as end:
        run_script("eval.py", "", monkeypatch, tmp_path)
    assert end.value.code == 2


def test_eval_writes_results_of_every_policy_on_the_same_episodes(monkeypatch, tmp_path, capsys):
    run_script("ppo_residual.py", TINY, monkeypatch, tmp_path)
    last = next(tmp_path.glob("runs/*/last.pt"))
    flags = f"--model-path {last} --compare-base --compare-zero --compare-random --n-episodes 3 --plot"
    run_script("eval.py", flags, monkeypatch, tmp_path)
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "eval_results" / "results.json").read_text())
    assert len(results["policies"]) == 4 and results["args"]["n_episodes"] == 3
    for name, row in results["policies"].items():
        assert [episode["seed"] for episode in row["episodes"]] == [2_000_000, 2_000_001, 2_000_002]
        assert set(row["episodes"][0]) == {
            "seed", "success", "return", "length", "final_distance_m", "final_yaw_error_rad"
        }  # fmt: skip
        assert f"\n{name} " in table
        assert row["success_rate"] == np.mean([episode["success"] for episode in row["episodes"]])
    assert results["policies"]["zero"]["success_rate"] == 0
    assert (tmp_path / "eval_results" / "results.png").stat().st_size > 10_000


def test_checkpoints_for_different_squares_are_not_compared(tmp_path):
    checkpoint = evaluation.load_checkpoint(ROOT / "assets" / "ppo_residual.pt")
    paths = []
    for half_size in (0.08, 0.078):
        checkpoint["env_kwargs"]["tape_half_size"] = half_size
        paths.append(str(tmp_path / f"{half_size}.pt"))
        torch.save(checkpoint, paths[-1])
    with pytest.raises(ValueError, match="tape_half_size"):
        evaluation.load_policies(evaluation.Args(model_path=tuple(paths)))


def test_policies_beside_a_checkpoint_act_at_its_scale(tmp_path):
    checkpoint = evaluation.load_checkpoint(ROOT / "assets" / "ppo_residual.pt")
    checkpoint["env_kwargs"]["act_scale"] = 0.04
    torch.save(checkpoint, tmp_path / "fast.pt")
    args = evaluation.Args(model_path=(str(tmp_path / "fast.pt"),), policy=("jacobian",))
    policies, env_kwargs = evaluation.load_policies(args)
    assert policies["jacobian"].act_scale == env_kwargs["jacobian"]["act_scale"] == 0.04


@pytest.mark.parametrize("flags", ["--video-stride 0", "--video-height 2000", "--n-episodes 0"])
def test_bad_flags_of_eval(flags, monkeypatch, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        run_script("eval.py", f"--policy zero {flags}", monkeypatch, tmp_path)
    assert end.value.code == 2 and capfd.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_summary_uses_the_wilson_interval():
    success = np.arange(100) < 30
    episodes = {name: np.ones(100) for name in ("return", "final_distance_m", "final_yaw_error_rad", "residual_norm")}
    episodes |= {"success": success, "length": np.where(success, 60, 400), "seed": np.arange(100)}
    row = evaluation.summarize({**episodes, "forces": np.array([1.0, 2.0, 9.0])})
    z, n, p = 1.959964, 100, 0.3
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(row["ci95"], [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)])
    assert row["median_time_to_success_s"] == 2.0
    assert row["fingertip_force_n"] == {"median": 2.0, "max": 9.0}


def test_names_of_earlier_commands_are_aliases():
    flags = "--n-envs 4 --n-steps 16 --n-epochs 3 --clip-range 0.1 --batch-size 32"
    args = tyro.cli(Args, args=flags.split())
    assert (args.num_envs, args.num_steps, args.update_epochs, args.clip_coef, args.minibatch_size) == (
        4,
        16,
        3,
        0.1,
        32,
    )


def test_readme_commands_parse_and_name_files_that_exist():
    commands = re.findall(r"python3? (\w+\.py)([^\n&|#`]*)", (ROOT / "README.md").read_text())
    assert len(commands) >= 5
    for name, flags in commands:
        assert (ROOT / name).is_file(), name
        if name in SCRIPTS and "--help" not in flags:
            tyro.cli(SCRIPTS[name], args=shlex.split(flags.replace("\\", " ")))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_help(name):
    (args,) = [node for node in ast.parse((ROOT / name).read_text()).body if getattr(node, "name", "") == "Args"]
    body = args.body
    for field, help_text in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(help_text, ast.Expr) and len(help_text.value.value) > 5, field.target.id


@pytest.mark.slow
def test_the_residual_learns_to_beat_its_base(monkeypatch, tmp_path):
    """In under three minutes on two cores."""
    flags = "--total-timesteps 250000 --eval-freq 1000000 --test-episodes 100"
    results = run_script("ppo_residual.py", flags, monkeypatch, tmp_path)["results"]
    base, residual = results.values()
    assert residual["success_rate"] > base["success_rate"] + 0.3
