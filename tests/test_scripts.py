"""The training scripts and eval.py: algorithms, what keeps the scripts alike, checkpoints, bad input, README."""

import ast
import json
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import act
import base_policies
import benchmark
import diffusion_policy
import eval as evaluation
import ppo
import ppo_residual
import record_demos
import reproduce
import sac_residual
from base_policies import JacobianIKPolicy
from env_paper_square import OBS_DIM, PaperSquareVectorEnv
from ppo_residual import Agent, AgentPolicy, Args, ResidualPolicy, compute_gae
from sac_residual import ReplayBuffer, n_step_returns

ROOT = Path(__file__).resolve().parent.parent
TRAINING = {"ppo.py": ppo, "ppo_residual.py": ppo_residual, "sac_residual.py": sac_residual}
SCRIPTS = {name: module.Args for name, module in TRAINING.items()}
OTHERS = (act, benchmark, diffusion_policy, evaluation, record_demos, reproduce)
SCRIPTS |= {f"{module.__name__}.py": module.Args for module in OTHERS}
TINY_RUN = "--total-timesteps 32 --num-envs 2 --eval-episodes 1 --test-episodes 1 --eval-freq 1000"
TINY = {
    "ppo.py": f"{TINY_RUN} --num-steps 8 --minibatch-size 8 --update-epochs 1",
    "ppo_residual.py": f"{TINY_RUN} --num-steps 8 --minibatch-size 8 --update-epochs 1",
    "sac_residual.py": f"{TINY_RUN} --learning-starts 8 --batch-size 8 --buffer-size 1000",
}


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
        self.num_envs, self.tape_half_size, self.max_episode_steps = num_envs, 0.08, 400
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
            final_info = {key: np.zeros(2) for key in ("dist_to_goal", "orientation_error", "physics_reset")}
            infos |= {"final_obs": final_obs, "final_info": final_info}
            self.steps[done] = 0
        return self.observe(), rewards, terminations, truncations, infos

    def state_dict(self):
        return {}


def run_toy(name, flags, monkeypatch, folder):
    monkeypatch.setattr(gym.registry["PaperSquare-v0"], "vector_entry_point", ToyVectorEnv)
    return run_script(name, f"{TINY_RUN} --gamma 0.9 --reward-scale 0.1 {flags}", monkeypatch, folder)


@pytest.mark.parametrize("name", ["ppo.py", "ppo_residual.py"])
def test_rollout_stores_whole_transitions_and_bootstraps_truncation_only(name, monkeypatch, tmp_path):
    flags = "--total-timesteps 12 --num-steps 6 --minibatch-size 12 --update-epochs 1 --learning-rate 1e-12"
    if name == "ppo_residual.py":
        flags += " --base-policy zero --residual-penalty 0"
    script = run_toy(name, flags, monkeypatch, tmp_path)
    obs, rewards, dones = script["obs"], script["rewards"], script["dones"]
    assert obs[:, 0, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert obs[:, 1, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert dones[:, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert dones[:, 1].tolist() == [0, 0, 1, 0, 0, 1]
    final_obs = torch.zeros(1, obs.shape[2])
    final_obs[0, 0] = 2.0  # the observation that the truncated episode ended with, not the next episode's first
    with torch.no_grad():
        last_value = script["agent"].get_value(final_obs).item()
    expected = [1, 2 + 0.9 * last_value] * 3
    np.testing.assert_allclose(rewards[:, 0].numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(rewards[:, 1].numpy(), [1, 2, 3, 1, 2, 3], rtol=1e-6)
    # the critic started at the value of the first rewards, 1 on average, for ever
    np.testing.assert_allclose(script["values"].numpy(), 10.0, atol=3.0)


def test_replay_holds_whole_transitions_and_never_mixes_episodes(monkeypatch, tmp_path):
    flags = "--total-timesteps 24 --learning-starts 100 --base-policy zero --residual-penalty 0 --buffer-size 16"
    rb = run_toy("sac_residual.py", flags, monkeypatch, tmp_path)["rb"]
    assert (rb.capacity, rb.size, rb.pos) == (8, 8, 4)  # 12 steps of each environment, the last 8 of them kept
    order = np.arange(4, 12) % 8
    assert rb.obs[order, 0, 0].tolist() == [0, 1] * 4
    assert rb.next_obs[order, 0, 0].tolist() == [1, 2] * 4  # 2 is the ended episode's own last observation
    assert rb.obs[order, 1, 0].tolist() == [1, 2, 0, 1, 2, 0, 1, 2]
    assert rb.next_obs[order, 1, 0].tolist() == [2, 3, 1, 2, 3, 1, 2, 3]
    assert rb.dones[order, 0].tolist() == [0, 1] * 4 and not rb.terminations[:, 0].any()  # truncated
    assert rb.terminations[order, 1].tolist() == [0, 1, 0, 0, 1, 0, 0, 1]
    np.testing.assert_allclose(rb.rewards[order, 0], [1, 2] * 4)
    batch = rb.sample(1000, 3, 0.9)
    assert torch.equal(batch["obs"][:, 1], batch["next_obs"][:, 1])  # the same environment
    assert (batch["next_obs"][:, 0] > batch["obs"][:, 0]).all()  # later in the same episode
    columns = (batch["obs"][:, 1], batch["obs"][:, 0], batch["next_obs"][:, 0], batch["returns"], batch["discounts"])
    seen = {tuple(round(value, 4) for value in row) for row in torch.stack(columns, 1).tolist()}
    # environment, step of the observation and of the one bootstrapped from, sum of rewards, discount
    assert seen == {(0, 0, 2, 2.8, 0.81), (0, 1, 2, 2, 0.9), (1, 0, 3, 5.23, 0), (1, 1, 3, 4.7, 0), (1, 2, 3, 3, 0)}


class DiaryBase(base_policies.Stateless):
    """A base policy that writes down what each environment is asked: the step in its episode, or "reset"."""

    def __init__(self):
        self.diary = {0: [], 1: []}

    def __call__(self, obs, mask=None):
        ids = range(len(obs)) if mask is None else np.flatnonzero(mask)
        for i, row in zip(ids, obs, strict=True):
            assert row[1] == i  # the environment's own observation
            self.diary[i].append(int(row[0]))
        return np.zeros((len(obs), 6))

    def reset(self, mask):
        for i in np.flatnonzero(mask):
            self.diary[i].append("reset")


@pytest.mark.parametrize("name", ["ppo_residual.py", "sac_residual.py"])
def test_base_is_asked_about_each_environment_once_per_step_and_in_order(name, monkeypatch, tmp_path):
    base = DiaryBase()
    monkeypatch.setattr(base_policies, "make_base", lambda args, il_state=None, device="cpu": base)

    def validate(policy, checkpoint, num_episodes, elapsed, evaluations, run_dir):  # would ask it too
        evaluations.append({"eval_seconds": 0.0, "success_rate": 0.0})
        return {"success_rate": 0.0}

    monkeypatch.setattr(evaluation, "validate", validate)
    monkeypatch.setattr(evaluation, "report", lambda *args, **kwargs: {})
    flags = "--total-timesteps 12 --num-steps 6 --minibatch-size 12 --update-epochs 1"
    if name == "sac_residual.py":
        flags = "--total-timesteps 12 --learning-starts 100"
    run_toy(name, flags, monkeypatch, tmp_path)
    truncated, terminated = [0, 1, 2, "reset"], [0, 1, 2, "reset"]  # the last observation too, for its value
    if name == "sac_residual.py":
        terminated = [0, 1, 2, 3, "reset"]  # stored, though its value does not count
    assert base.diary[0] == ["reset", *truncated * 3, 0]
    assert base.diary[1] == ["reset", *terminated * 2, 0]


@pytest.mark.parametrize("name", ["ppo_residual.py", "sac_residual.py"])
def test_a_checkpoint_holds_its_imitation_learned_base(name, monkeypatch, tmp_path):
    act_args = act.Args(dim_model=8, n_heads=2, dim_feedforward=8)
    path = tmp_path / "act.pt"
    torch.save(act.make_checkpoint(act_args, act.Network(act_args), 1), path)
    for flags in (
        f"--base-policy il --il-checkpoint {path}",
        f"--base-policy hybrid --hybrid-bases jacobian il --il-checkpoint {path}",
    ):
        script = run_script(name, f"{TINY[name]} {flags} --exp-name {len(flags)}", monkeypatch, tmp_path)
        policies = [script["policy"]]
        content = path.read_bytes()
        path.unlink()
        base_policies.load_il.cache_clear()
        policies.append(script["make_policy"](evaluation.load_checkpoint(script["run_dir"] / "last.pt")))
        one, other = (evaluation.play_episodes(policy, [5], {"max_episode_steps": 20}) for policy in policies)
        assert one["return"] == other["return"] and one["moved_m"] == other["moved_m"]
        path.write_bytes(content)


def test_n_step_returns_are_hand_written_sums():
    rewards = torch.tensor([[1.0, 2.0, 4.0]] * 4)
    ends = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
    returns, length = n_step_returns(rewards, ends, 0.5)
    assert returns.tolist() == [1 + 0.5 * 2 + 0.25 * 4, 1 + 0.5 * 2, 1, 1 + 0.5 * 2 + 0.25 * 4]
    assert length.tolist() == [3, 2, 1, 3]


def test_n_step_returns_do_not_run_past_the_newest_transition():
    rb = ReplayBuffer(4, 1, 1, 1)
    for t in range(6):  # two of them overwritten
        rb.add(
            obs=[[t]], base_actions=[[0]], actions=[[0]], rewards=[1.0], next_obs=[[t + 1]], next_base_actions=[[0]],
            terminations=[0], dones=[0],
        )  # fmt: skip
    batch = rb.sample(200, 3, 1.0)
    start, end = batch["obs"].flatten(), batch["next_obs"].flatten()
    assert set(start.tolist()) == {2, 3, 4, 5}
    assert torch.equal(end, (start + 3).clamp(max=6)) and torch.equal(batch["returns"], end - start)


def test_targets_follow_the_critics_by_tau(monkeypatch, tmp_path):
    flags = f"{TINY['sac_residual.py']} --tau 0.25 --utd 0.5 --learning-rate 0.1 --total-timesteps 10"
    before = run_script("sac_residual.py", f"{flags} --learning-starts 100 --exp-name before", monkeypatch, tmp_path)
    after = run_script("sac_residual.py", flags, monkeypatch, tmp_path)
    assert (before["gradient_steps"], after["gradient_steps"]) == (0, 1)
    for q in ("qf1", "qf2"):
        start, online, target = before[q].state_dict(), after[q].state_dict(), after[f"{q}_target"].state_dict()
        assert not torch.equal(start["net.1.weight"], online["net.1.weight"])
        for key in start:
            torch.testing.assert_close(target[key], 0.75 * start[key] + 0.25 * online[key])


def test_warm_up_is_the_base_alone_and_progressive_exploration_mixes(monkeypatch, tmp_path):
    flags = f"{TINY_RUN} --base-policy zero --init-std 1 --total-timesteps 400 --warmup-std 0"
    rb = run_script("sac_residual.py", f"{flags} --learning-starts 400", monkeypatch, tmp_path)["rb"]
    assert not rb.actions[: rb.size].any()
    flags += " --learning-starts 0 --utd 0.001"
    assert (
        run_script("sac_residual.py", f"{flags} --exp-name always", monkeypatch, tmp_path)["rb"]
        .actions[:200]
        .any(2)
        .all()
    )
    rb = run_script("sac_residual.py", f"{flags} --prog-explore 400 --exp-name some", monkeypatch, tmp_path)["rb"]
    acted = rb.actions[:200].any(2).float()
    assert 0.1 < acted[:100].mean() < 0.4 < 0.6 < acted[100:].mean() < 0.9


def test_density_of_the_squashed_action_integrates_to_one():
    torch.manual_seed(0)
    actor = sac_residual.Actor(1, 1, 8, 0.7, zero_init=False)
    with torch.no_grad():
        action, logprob = actor.get_action(torch.zeros(400_000, 1), torch.randn(400_000, 1))
    inside = action.flatten().abs() < 0.9
    # E[1 / density] over an interval is its length
    assert ((-logprob[inside]).exp().sum() / len(action)).item() == pytest.approx(1.8, rel=0.01)


# What keeps a flat, duplicated layout honest


def definitions(name):
    """Top-level definitions of a script, by name."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in ast.parse((ROOT / name).read_text()).body if isinstance(node, kinds)}


def flags_of(name):
    """Default and help of every flag of a script's own Args, by name, as written."""
    body = definitions(name)["Args"].body
    return {
        field.target.id: (ast.unparse(field), help_text.value.value)
        for field, help_text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
    }


MAY_DIFFER = {  # definition: why
    ("ppo.py", "ppo_residual.py"): {
        "Args": "flags of the base and the residual",
        "check_args": "alpha and the base",
        "make_checkpoint": "an imitation-learned base goes along",
        "make_policy": "the base plays too",
    },
    ("ppo_residual.py", "sac_residual.py"): {
        "Args": "flags of the algorithm",
        "check_args": "flags of the algorithm",
        "mlp": "ReLU and layer normalisation, as off-policy critics want them",
        "AgentPolicy": "SAC squashes its actions",
        "make_checkpoint": "an actor alone is saved",
        "make_policy": "an actor alone is saved",
    },
    ("act.py", "diffusion_policy.py"): {
        "Args": "flags of the algorithm",
        "check_args": "flags of the algorithm",
        "Network": "the algorithm",
        "make_policy": "what is sampled",
    },
}
MAY_DIFFER_IN_FLAG = {  # flag: why
    ("ppo.py", "ppo_residual.py"): {},
    ("ppo_residual.py", "sac_residual.py"): {
        "total_timesteps": "SAC needs fewer",
        "save_freq": "SAC takes fewer, and longer over each",
        "eval_freq": "SAC needs fewer steps",
        "num_envs": "SAC updates more often per step",
        "learning_rate": "the optimum differs",
        "hidden_size": "critics off policy want more",
        "init_std": "SAC squashes its actions",
    },
    ("act.py", "diffusion_policy.py"): {},
}


@pytest.mark.parametrize("pair", MAY_DIFFER)
def test_same_name_same_definition(pair):
    one, other = (definitions(name) for name in pair)
    different = {name for name in one.keys() & other.keys() if ast.dump(one[name]) != ast.dump(other[name])}
    assert different == set(MAY_DIFFER[pair])


@pytest.mark.parametrize("pair", MAY_DIFFER)
def test_same_flag_same_default_and_help(pair):
    one, other = (flags_of(name) for name in pair)
    different = {name for name in one.keys() & other.keys() if one[name] != other[name]}
    assert different == set(MAY_DIFFER_IN_FLAG[pair])


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs the command diff")
def test_the_diff_is_the_idea():
    command = ["diff", "ppo.py", "ppo_residual.py"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    hunks = []
    for line in lines:
        if line[0].isdigit():
            hunks.append("")
        hunks[-1] += f"{line}\n"
    assert len(hunks) <= 14
    assert sum(line.startswith(("<", ">")) for line in lines) <= 94
    for hunk in hunks:
        assert re.search("base|residual", hunk, re.IGNORECASE), hunk
    readme = (ROOT / "README.md").read_text()
    changed = sum(line.startswith(("<", ">")) for line in lines)
    assert f"in {len(hunks)} hunks and {changed} lines" in readme
    for name in (*TRAINING, "act.py", "diffusion_policy.py"):
        assert f"**`{name}`** ({len((ROOT / name).read_text().splitlines())} lines)" in readme
    assert not re.search("base|residual", (ROOT / "ppo.py").read_text(), re.IGNORECASE)


def test_a_residual_on_nothing_is_pure_rl(monkeypatch, tmp_path):
    losses = {}
    for name, flags in (
        ("ppo.py", ""),
        ("ppo_residual.py", "--base-policy zero --alpha 1 --no-base-input --residual-penalty 0"),
    ):
        script = run_script(name, f"{TINY[name]} {flags}", monkeypatch, tmp_path)
        events = EventAccumulator(str(script["run_dir"])).Reload()
        keys = [key for key in events.Tags()["scalars"] if key.startswith("losses/")]
        losses[name] = {key: [scalar.value for scalar in events.Scalars(key)] for key in keys}
        losses[name]["weights"] = [p.double().sum().item() for p in script["agent"].parameters()]
    assert losses["ppo.py"] == losses["ppo_residual.py"]
    assert len(losses["ppo.py"]["losses/policy_loss"]) == 2


def test_fresh_residual_is_the_base_action_for_action():
    base = JacobianIKPolicy()
    policy = ResidualPolicy(AgentPolicy(fresh_agent()), JacobianIKPolicy(), 0.5, base_input=True)
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
        policy = ResidualPolicy(AgentPolicy(agent), base, alpha, base_input=True)
        np.testing.assert_allclose(policy(obs), np.clip(base(obs) + alpha, -1, 1), atol=1e-6)
        assert np.all(policy.residual_action == 1.0)


@pytest.mark.parametrize("name", TRAINING)
def test_checkpoint_alone_rebuilds_the_policy(name, monkeypatch, tmp_path):
    flags = f"{TINY[name]} --learning-rate 0.1"
    if name != "ppo.py":
        flags += " --alpha 0.4 --ik-gain 0.4"
    script = run_script(name, flags, monkeypatch, tmp_path)
    checkpoint = evaluation.load_checkpoint(script["run_dir"] / "last.pt")
    assert checkpoint["global_step"] == 32 and checkpoint["script"] == Path(name).stem
    policy = TRAINING[name].make_policy(checkpoint)
    if name != "ppo.py":
        assert policy.base_policy.gain == 0.4 and policy.alpha == 0.4
    in_process, from_file = (evaluation.play_episodes(p, range(3), {}) for p in (script["policy"], policy))
    for key in ("success", "return", "length", "residual_norm"):
        np.testing.assert_array_equal(in_process[key], from_file[key])
    assert (in_process["residual_norm"].min() > 0) == (name != "ppo.py")


def test_a_run_writes_what_the_readme_says(monkeypatch, tmp_path):
    logged = {}
    for name in TRAINING:
        flags = TINY[name].replace("--total-timesteps 32", "--total-timesteps 416")  # the first episodes end
        run_dir = tmp_path / run_script(name, flags, monkeypatch, tmp_path)["run_dir"]
        assert {"args.json", "best.pt", "last.pt", "results.json"} <= {path.name for path in run_dir.iterdir()}
        assert json.loads((run_dir / "args.json").read_text())["num_envs"] == 2
        logged[name] = set(EventAccumulator(str(run_dir)).Reload().Tags()["scalars"])
    groups = "charts|eval|losses|residual|reward|rollout|task|time"
    readme = (ROOT / "README.md").read_text()
    documented = set(re.findall(f"`((?:{groups})/\\w+)`", readme))
    assert "`reward/<term>`" in readme
    everything = set.union(*logged.values())
    imitation = (ROOT / "act.py").read_text() + (ROOT / "diffusion_policy.py").read_text()
    imitated = set(re.findall(f'"((?:{groups})/\\w+)"', imitation))
    assert documented == {key for key in everything if not key.startswith("reward/")} | imitated
    only = {name: everything - keys for name, keys in logged.items()}  # what a script does not log
    assert all(key.startswith(("losses/", "residual/")) for key in set.union(*only.values()))


FLAGS = {
    "--base-policy zero --no-base-input --alpha 1 --no-anneal-lr": 1.0,
    "--base-policy hybrid --hybrid-mode switch --hybrid-weights 0.7 0.3 --curriculum": 0.5,
    "--alpha-schedule linear --no-randomize --capture-video": 1.0,  # at the end
}


@pytest.mark.parametrize("flags", FLAGS)
def test_other_flags_run_too(flags, monkeypatch, tmp_path):
    if "--capture-video" in flags:
        try:
            evaluation.check_rendering()
        except RuntimeError as error:
            pytest.skip(str(error))
    script = run_script("ppo_residual.py", f"{TINY['ppo_residual.py']} {flags}", monkeypatch, tmp_path)
    checkpoint = evaluation.load_checkpoint(next(tmp_path.glob("runs/*/last.pt")))
    assert ppo_residual.make_policy(checkpoint).alpha == pytest.approx(FLAGS[flags])
    assert script["envs"].tape_half_size == pytest.approx(0.08)
    if "--capture-video" in flags:
        assert list(tmp_path.glob("runs/*/episode.mp4"))


def test_track_without_wandb_is_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(SystemExit) as end:
        run_script("ppo_residual.py", "--track", monkeypatch, tmp_path)
    assert end.value.code == 2 and "wandb" in capfd.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", TRAINING)
def test_same_seed_same_weights_whatever_the_threads(name, threads, monkeypatch, tmp_path):
    runs = []
    for folder, count in (("one", 1), ("other", threads)):
        (tmp_path / folder).mkdir()
        flags = f"{TINY[name]} --num-threads {count} --seed 3"
        script = run_script(name, flags, monkeypatch, tmp_path / folder)
        runs.append(script["checkpoint"]["model"])
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


@pytest.mark.parametrize("name", TRAINING)
def test_evaluations_leave_the_training_as_it_is(name, monkeypatch, tmp_path):
    runs = []
    for eval_freq in (1000, 8):
        flags = TINY[name].replace("--eval-freq 1000", f"--eval-freq {eval_freq} --exp-name {eval_freq}")
        runs.append(run_script(name, flags, monkeypatch, tmp_path))
    assert len(runs[0]["evaluations"]) < len(runs[1]["evaluations"])
    one, other = (run["checkpoint"]["model"] for run in runs)
    assert all(torch.equal(one[key], other[key]) for key in one)


BAD_INPUT = {
    "--alpha 1.5": "alpha",
    "--alpha -0.1": "alpha",
    "--alpha-schedule cosine": "alpha-schedule",
    "--minibatch-size 1000": "minibatch",
    "--total-timesteps 10": "total-timesteps",
    "--base-policy il --il-checkpoint nowhere.pt": "il",
    "--base-policy hybrid --hybrid-bases jacobian nothing": "nothing",
    "--base-policy hybrid --hybrid-weights 1.0": "weight",
    "--base-policy magic": "magic",
    "--eval-episodes 0": "eval-episodes",
    "--learning-rate 0": "learning-rate",
    "--learning-rate nan": "learning-rate",
    "--num-envs 0": "num-envs",
}


BAD_INPUT_OF_SAC = {
    "--num-envs 0": "num-envs",
    "--utd 0": "utd",
    "--buffer-size 20": "buffer-size",
    "--n-step 0": "n-step",
    "--total-timesteps 5": "total-timesteps",
    "--prog-explore -1": "prog-explore",
    "--tau 1.5": "tau",
    "--temperature 0": "temperature",
}


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        *[("ppo_residual.py", *item) for item in BAD_INPUT.items()],
        *[("ppo.py", *item) for item in BAD_INPUT.items() if "alpha" not in item[0] and "base" not in item[0]],
        *[("sac_residual.py", *item) for item in (BAD_INPUT | BAD_INPUT_OF_SAC).items() if "minibatch" not in item[0]],
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(name, flags, expected, monkeypatch, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        run_script(name, flags, monkeypatch, tmp_path)
    captured = capfd.readouterr()
    assert end.value.code == 2
    assert expected in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unwritable_output_folder(monkeypatch, tmp_path, capfd):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(SystemExit) as end:
        run_script("ppo_residual.py", "", monkeypatch, tmp_path)
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
    runs = [run_script(name, TINY[name], monkeypatch, tmp_path)["run_dir"] for name in TRAINING]
    paths = " ".join(f"{run_dir}/last.pt" for run_dir in runs)  # of which script, eval.py reads there
    flags = f"--model-path {paths} --compare-base --compare-zero --compare-random --n-episodes 3 --plot"
    run_script("eval.py", flags, monkeypatch, tmp_path)
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "eval_results" / "results.json").read_text())
    names = {"base jacobian", "ppo seed 1", "ppo_residual seed 1", "sac_residual seed 1", "zero", "random"}
    assert set(results["policies"]) == names and results["args"]["n_episodes"] == 3
    for name, row in results["policies"].items():
        assert [episode["seed"] for episode in row["episodes"]] == [2_000_000, 2_000_001, 2_000_002]
        assert set(row["episodes"][0]) == {
            "seed", "success", "return", "length", "final_distance_m", "final_yaw_error_rad", "failure"
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


def test_pure_rl_has_no_base_to_compare_with():
    args = evaluation.Args(model_path=(str(ROOT / "assets" / "ppo.pt"),), compare_base=True)
    with pytest.raises(ValueError, match="base policy"):
        evaluation.load_policies(args)


@pytest.mark.parametrize("name", TRAINING)
def test_the_checkpoint_that_comes_with_a_script_solves_the_task(name):
    checkpoint = evaluation.load_checkpoint((ROOT / "assets" / name).with_suffix(".pt"))
    episodes = evaluation.play_episodes(TRAINING[name].make_policy(checkpoint), range(20), checkpoint["env_kwargs"])
    assert episodes["success"].mean() >= 0.9


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


@pytest.mark.parametrize("name", ["random", "jacobian"])
def test_the_benchmark_replays_what_the_environments_do_to_the_last_bit(name):
    envs = PaperSquareVectorEnv(4)
    policy = evaluation.RandomPolicy() if name == "random" else JacobianIKPolicy()
    obs, _ = envs.reset(seed=0, options={"episode_steps": np.array([0, 330, 360, 390])})
    policy.reset(np.ones(4, dtype=bool))
    ends = 0
    for _ in range(100):
        actions = 1.5 * policy(obs)  # some are clipped
        seconds, qpos = benchmark.replay(envs, actions)
        obs, _, terminations, truncations, _ = envs.step(actions)
        done = terminations | truncations
        np.testing.assert_array_equal(qpos[~done], envs.batch.bind("qpos")[~done])
        policy.reset(done)
        ends += done.sum()
    assert seconds > 0 and ends >= 3  # what follows a reset is replayed too


TINY_BENCHMARK = "--repeats 2 --seconds 0.01 --num-envs 1 2 --warmup-steps 1"


def test_the_benchmark_prints_every_row(monkeypatch, tmp_path, capsys):
    def run(command, cwd=None, **kwargs):  # the processes that it starts, which other tests start for real
        if "--total-timesteps" in command:
            with SummaryWriter(Path(cwd) / "runs" / "run") as writer:
                for step, seconds in ((4096, 9.0), (8192, 1.0)):  # the first rollout does not count
                    writer.add_scalar("time/collect", seconds, step)
                    writer.add_scalar("time/update", 3 * seconds, step)
        return SimpleNamespace(returncode=0, stdout="0.002\n500000\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # Stable-Baselines3 may be missing
    flags = f"{TINY_BENCHMARK} --bases jacobian {ROOT}/assets/act.pt --training-steps 8192 --sb3-steps 1"
    rows = run_script("benchmark.py", flags, monkeypatch, tmp_path)["samples"]
    table = capsys.readouterr().out
    for workload in ("random", "jacobian", "residual"):
        for n in (1, 2, 64):
            assert any(row.startswith(f"{workload}, num_envs {n}, ") for row in rows)
    trainings = [*TRAINING, "ppo_residual.py, num_envs 2"]
    rest = ["base jacobian", f"base {ROOT}/assets/act.pt", "agent, 128 observations"]
    rest += [row for name in trainings for row in (name, f"{name}, collection", f"{name}, update")]
    rest += ["Stable-Baselines3, 4 processes", "Stable-Baselines3, 128 environments in threads"]
    assert {row for row in rows if "num_threads" not in row} == {*rest, "ppo_residual.py --help", "eval.py --help"}
    for row, samples in rows.items():
        assert f"\n{row} " in table and len(samples) == 2
    assert "is 512000.0 (512000.0 to 512000.0) times as fast" in table
    assert re.search("\nppo.py  +1,024 .* 512 .* MB\nppo.py, collection  +4,096 .*\nppo.py, update  +1,365 ", table)
    assert not list(tmp_path.iterdir())


def test_the_benchmark_without_trainings_and_stable_baselines3(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = f"{TINY_BENCHMARK} --repeats 1 --training-steps 0 --bases jacobian"
    rows = run_script("benchmark.py", flags, monkeypatch, tmp_path)["samples"]
    assert not [row for row in rows if "collection" in row or "Baselines" in row]
    assert "pip install stable-baselines3==2.9.2" in capsys.readouterr().out.splitlines()[-1]
    pinned = (ROOT / "tests" / "requirements.txt").read_text().split()
    assert "stable-baselines3==2.9.2" in pinned and "stable-baselines3==2.9.2" in benchmark.__doc__


def test_the_benchmark_trains_by_the_scripts_themselves():
    flags = "--total-timesteps 512 --num-envs 8 --num-steps 16 --minibatch-size 128 --eval-episodes 1 --test-episodes 1"
    whole, collect, update, peak = benchmark.train("ppo_residual.py", flags.split(), 128)
    assert 1 / whole == pytest.approx(1 / collect + 1 / update) and peak > 100
    assert benchmark.run_function(f"train_and_replay('ppo_residual.py', 128, *{flags.split()})") > 0
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):  # a training that fails is no row of zeros
        benchmark.run_child(".", "-c", "1 / 0")


@pytest.mark.parametrize(
    "call", ["learn_with_sb3(False, 1)", "learn_with_sb3(True, 1)", "learn_with_sb3(True, 1, True)"]
)
def test_the_benchmark_trains_by_stable_baselines3(call, monkeypatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several times faster where other tests run beside it
    assert benchmark.run_function(call) > 0


@pytest.mark.parametrize(
    "flags",
    [
        "--repeats 0",
        "--seconds nan",
        "--warmup-steps -1",
        "--num-envs 0",
        "--num-envs 3",
        "--num-envs 8192",
        "--training-steps 1",
        "--sb3-steps -1",
        "--bases magic",
    ],
)
def test_bad_flags_of_the_benchmark(flags, monkeypatch, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        run_script("benchmark.py", flags, monkeypatch, tmp_path)
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert flags.split()[0] in error or "magic" in error


def test_summary_uses_the_wilson_interval():
    success = np.arange(100) < 30
    episodes = {name: np.ones(100) for name in ("return", "final_distance_m", "final_yaw_error_rad", "residual_norm")}
    episodes |= {"success": success, "length": np.where(success, 60, 400), "seed": np.arange(100)}
    episodes |= {"failure": np.where(success, "", "turned"), "residual_norm_by_step": np.zeros(0)}
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


@pytest.mark.parametrize("name", [*SCRIPTS, "env_paper_square.py", "base_policies.py"])
def test_every_flag_has_help(name):
    body = definitions(name)[{"env_paper_square.py": "EnvArgs", "base_policies.py": "BaseFlags"}.get(name, "Args")].body
    for field, help_text in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(help_text, ast.Expr) and len(help_text.value.value) > 5, field.target.id


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("ppo_residual.py", 100_000), ("sac_residual.py", 30_000)])
def test_the_residual_learns_to_beat_its_base(name, steps, monkeypatch, tmp_path):
    """In two minutes on two cores; at these lengths two seeds of each beat the base by 0.4 or more."""
    flags = f"--total-timesteps {steps} --eval-freq 1000000 --test-episodes 100"
    results = run_script(name, flags, monkeypatch, tmp_path)["results"]
    base, residual = results.values()
    assert residual["success_rate"] > base["success_rate"] + 0.3
