"""The training scripts: their algorithms, what keeps them alike, what they write, and what the pages say of them."""

import ast
import dataclasses
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import types
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import act
import base_policies
import benchmark
import dagger
import diffusion_policy
import eval as evaluation
import ppo
import ppo_residual
import ppo_residual_multigpu
import real_arm
import record_demos
import reproduce
import runs
import sac_residual
from base_policies import BasePolicy, JacobianIKPolicy
from env_paper_square import OBS, OBS_DIM, OBS_ROWS, OBS_SCALE, to_si
from ppo_residual import Agent, compute_gae

ROOT = Path(__file__).resolve().parent.parent
RL = {"ppo.py": ppo, "ppo_residual.py": ppo_residual, "sac_residual.py": sac_residual}
IMITATION = {"act.py": act, "diffusion_policy.py": diffusion_policy}
TRAINING = RL | {"ppo_residual_multigpu.py": ppo_residual_multigpu, "dagger.py": dagger} | IMITATION
SCRIPTS = TRAINING | {
    f"{module.__name__}.py": module for module in (benchmark, evaluation, real_arm, record_demos, reproduce)
}
PAGES = {path: path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("assets/*.md"))}
TINY_RUN = "--total-timesteps 32 --num-envs 2 --eval-episodes 1 --test-episodes 1 --eval-freq 1000 --num-threads 1"
TINY = {
    "ppo.py": f"{TINY_RUN} --num-steps 8 --minibatch-size 8 --update-epochs 1",
    "ppo_residual.py": f"{TINY_RUN} --num-steps 8 --minibatch-size 8 --update-epochs 1",
    "sac_residual.py": f"{TINY_RUN} --learning-starts 8 --batch-size 8 --buffer-size 1000",
}


def run_script(name, flags, monkeypatch, folder):
    """Run a script as `python name flags` would, in `folder`; returns its globals."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(flags)])
    for module in (sys, threading):  # what a script changes for its process
        monkeypatch.setattr(module, "excepthook", module.excepthook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return runpy.run_path(str(ROOT / name), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def no_evaluations(monkeypatch):
    """Trainings that play no episodes of evaluation; the (policy, checkpoint) that each ended with."""
    reported = []
    row = {"eval_seconds": 0.0, "success_rate": 0.0}
    monkeypatch.setattr(evaluation, "validate", lambda run, policy, checkpoint: run.evaluations.append(row))
    monkeypatch.setattr(evaluation, "report", lambda run, policy, checkpoint: reported.append((policy, checkpoint)))
    return reported


# The pieces


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


def test_density_of_the_squashed_action_integrates_to_one():
    torch.manual_seed(0)
    actor = sac_residual.Actor(1, 1, 8, 0.7, zero_init=False)
    with torch.no_grad():
        action, logprob = actor.get_action(torch.zeros(400_000, 1), torch.randn(400_000, 1))
    inside = action.flatten().abs() < 0.9
    # E[1 / density] over an interval is its length
    assert ((-logprob[inside]).exp().sum() / len(action)).item() == pytest.approx(1.8, rel=0.01)


def test_targets_follow_the_critics_by_tau(no_evaluations, monkeypatch, tmp_path):
    flags = f"{TINY['sac_residual.py']} --tau 0.25 --utd 0.5 --learning-rate 0.1 --total-timesteps 10"
    before = run_script("sac_residual.py", f"{flags} --learning-starts 100", monkeypatch, tmp_path)
    after = run_script("sac_residual.py", flags, monkeypatch, tmp_path)
    assert (before["gradient_steps"], after["gradient_steps"]) == (0, 1)
    for q in ("qf1", "qf2"):
        start, online, target = before[q].state_dict(), after[q].state_dict(), after[f"{q}_target"].state_dict()
        assert not torch.equal(start["net.1.weight"], online["net.1.weight"])
        for key in start:
            torch.testing.assert_close(target[key], 0.75 * start[key] + 0.25 * online[key])


def test_warm_up_is_the_base_alone_and_progressive_exploration_mixes(no_evaluations, monkeypatch, tmp_path):
    flags = f"{TINY_RUN} --base-policy zero --init-std 1 --total-timesteps 400 --warmup-std 0 --utd 0.001"
    acted = {}
    for more in ("--learning-starts 400", "--learning-starts 0", "--learning-starts 0 --prog-explore 400"):
        acted[more] = run_script("sac_residual.py", f"{flags} {more}", monkeypatch, tmp_path)["rb"].actions[:200].any(2)
    warm_up, always, mixed = acted.values()
    assert not warm_up.any() and always.all()
    assert 0.1 < mixed[:100].float().mean() < 0.4 < 0.6 < mixed[100:].float().mean() < 0.9


# Environments whose episodes end where it is known


class ToyVectorEnv(VectorEnv):
    """Environment 0 is truncated after 2 steps, environment 1 terminates after 3; obs[0] counts the steps."""

    OBS_ROWS, OBS, OBS_DIM, OBS_SCALE, to_si = OBS_ROWS, OBS, OBS_DIM, OBS_SCALE, staticmethod(to_si)

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
        return {"steps": self.steps}


@pytest.fixture
def run_toy(no_evaluations, monkeypatch, tmp_path):
    monkeypatch.setattr(gym.registry["PaperSquare-v0"], "vector_entry_point", ToyVectorEnv)
    monkeypatch.setattr(runs, "ROOT", Path(__file__).parent)  # where the checkpoint's environment is looked for
    flags = "--num-envs 2 --gamma 0.9 --reward-scale 0.1"
    return lambda name, more: run_script(name, f"{flags} {more}", monkeypatch, tmp_path)


@pytest.mark.parametrize("name", ["ppo.py", "ppo_residual.py"])
def test_rollout_stores_whole_transitions_and_bootstraps_truncation_only(name, run_toy):
    flags = "--total-timesteps 12 --num-steps 6 --minibatch-size 12 --update-epochs 1 --learning-rate 1e-12"
    if name == "ppo_residual.py":
        flags += " --base-policy zero --residual-penalty 0"
    script = run_toy(name, flags)
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


def test_replay_holds_whole_transitions_and_n_steps_end_with_the_episode_or_the_newest_one(run_toy):
    flags = "--total-timesteps 26 --learning-starts 100 --base-policy zero --residual-penalty 0 --buffer-size 16"
    rb = run_toy("sac_residual.py", flags)["rb"]
    assert (rb.capacity, rb.size, rb.pos) == (8, 8, 5)  # 13 steps of each environment, the last 8 of them kept
    order = np.arange(5, 13) % 8
    assert rb.obs[order, 0, 0].tolist() == [1, 0] * 4
    assert rb.next_obs[order, 0, 0].tolist() == [2, 1] * 4  # 2 is the ended episode's own last observation
    assert rb.obs[order, 1, 0].tolist() == [2, 0, 1, 2, 0, 1, 2, 0]
    assert rb.next_obs[order, 1, 0].tolist() == [3, 1, 2, 3, 1, 2, 3, 1]
    assert rb.dones[order, 0].tolist() == [1, 0] * 4 and not rb.terminations[:, 0].any()  # truncated
    assert rb.terminations[order, 1].tolist() == [1, 0, 0, 1, 0, 0, 1, 0]
    np.testing.assert_allclose(rb.rewards[order, 0], [2, 1] * 4)
    batch = rb.sample(1000, 3, 0.9)
    columns = (batch["obs"][:, 1], batch["obs"][:, 0], batch["next_obs"][:, 0], batch["returns"], batch["discounts"])
    seen = {tuple(round(value, 4) for value in row) for row in torch.stack(columns, 1).tolist()}
    # environment, step of the observation and of the one bootstrapped from, sum of rewards, discount
    ends = {(0, 0, 2, 2.8, 0.81), (0, 1, 2, 2, 0.9), (1, 0, 3, 5.23, 0), (1, 1, 3, 4.7, 0), (1, 2, 3, 3, 0)}
    assert seen == ends | {(0, 0, 1, 1, 0.9), (1, 0, 1, 1, 0.9)}


class DiaryBase(BasePolicy):
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
def test_base_is_asked_about_each_environment_once_per_step_and_in_order(name, run_toy, monkeypatch):
    base = DiaryBase()
    monkeypatch.setattr(base_policies, "make_base", lambda *args, **kwargs: base)
    flags = "--num-steps 6 --minibatch-size 12" if name == "ppo_residual.py" else "--learning-starts 100"
    run_toy(name, f"--total-timesteps 12 {flags}")
    truncated, terminated = [0, 1, 2, "reset"], [0, 1, 2, "reset"]  # the last observation too, for its value
    if name == "sac_residual.py":
        terminated = [0, 1, 2, 3, "reset"]  # stored, though its value does not count
    assert base.diary[0] == ["reset", *truncated * 3, 0]
    assert base.diary[1] == ["reset", *terminated * 2, 0]


# What keeps a flat, duplicated layout honest

RESIDUALS = "ppo_residual ppo_residual_multigpu"
MAY_DIFFER = {  # definition: scripts that share one
    "Args": ["ppo", RESIDUALS, "sac_residual", "dagger", "act", "diffusion_policy"],  # the algorithm's flags
    "make_policy": ["ppo", RESIDUALS, "sac_residual", "dagger", "act", "diffusion_policy"],  # the algorithm's networks
    "mlp": [f"ppo {RESIDUALS}", "sac_residual"],  # ReLU and layer normalisation, as off-policy critics want them
    "AgentPolicy": [f"ppo {RESIDUALS}", "sac_residual"],  # SAC squashes its actions
    "Network": ["dagger", "act", "diffusion_policy"],  # the algorithm
    "make_network": ["dagger", "act diffusion_policy"],  # what it is built of
    "make_frames": ["act", "diffusion_policy"],  # the diffusion needs the actions' range
}
ON_POLICY, IMITATED = f"ppo {RESIDUALS}", "act diffusion_policy"
MAY_DIFFER_IN_FLAG = {  # flag: scripts that share one
    "total_timesteps": [ON_POLICY, "sac_residual", "dagger"],  # SAC needs fewer
    "eval_freq": [ON_POLICY, "sac_residual", "dagger", IMITATED],  # and imitation counts gradient steps
    "save_freq": [ON_POLICY, "sac_residual", "dagger", IMITATED],
    "num_envs": [ON_POLICY, "sac_residual", "dagger"],  # SAC updates more often per step
    "num_steps": [ON_POLICY, "dagger"],
    "utd": ["sac_residual", "dagger"],
    "learning_rate": [f"{ON_POLICY} dagger", "sac_residual", IMITATED],  # what is optimised, and by what
    "batch_size": ["sac_residual", "dagger", IMITATED],  # of transitions, of frames
    "anneal_lr": [f"{ON_POLICY} dagger {IMITATED}", "sac_residual"],  # SAC learns most in the first half
    "orientation_weight": [f"{ON_POLICY} dagger", "sac_residual"],  # by PPO's weight, two seeds took longer
    "reach_weight": [f"{ON_POLICY} dagger", "sac_residual"],  # its policies hovered without
    "pixels": ["dagger", "act"],  # without them, ACT sees where the sheet is
    "hidden_size": [ON_POLICY, "sac_residual", "dagger"],  # critics off policy want more
    "alpha": [RESIDUALS, "sac_residual"],  # with more of it SAC's first critics lead far astray
    "init_std": [ON_POLICY, "sac_residual"],  # SAC squashes its actions
    "torch_threads": [f"{ON_POLICY} sac_residual", f"dagger {IMITATED}"],  # no physics while imitation trains
    "num_threads": [f"{ON_POLICY} sac_residual dagger", IMITATED],
}


def definitions(name):
    """Top-level definitions of a script, by name."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in ast.parse((ROOT / name).read_text()).body if isinstance(node, kinds)}


def flags_of(kind):
    """Type, default and help of every flag of an Args, inherited ones too, as written, by name."""
    flags = {}
    for part in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        body = ast.parse(inspect.getsource(part)).body[0].body
        for field, text in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                flags[field.target.id] = ast.unparse(field), text.value.value if isinstance(text, ast.Expr) else ""
    return flags


def partitions(things):
    """Of every name whose `things[script][name]` are not all alike: the scripts that share one."""
    shared = {}
    for script, named in things.items():
        for name, thing in named.items():
            shared.setdefault(name, {}).setdefault(thing, set()).add(script.removesuffix(".py"))
    return {name: list(alike.values()) for name, alike in shared.items() if len(alike) > 1}


def test_same_name_same_definition_and_same_flag_same_default_and_help():
    dumps = {name: {key: ast.dump(node) for key, node in definitions(name).items()} for name in TRAINING}
    flags = {name: flags_of(module.Args) for name, module in TRAINING.items()}
    for found, allowed in ((partitions(dumps), MAY_DIFFER), (partitions(flags), MAY_DIFFER_IN_FLAG)):
        assert found == {name: [set(scripts.split()) for scripts in alike] for name, alike in allowed.items()}


@pytest.mark.parametrize("names", [RL, IMITATION])
def test_what_scripts_share_comes_in_the_same_order(names):
    scripts = [list(definitions(name)) for name in names]
    for one, other in zip(scripts, scripts[1:], strict=False):
        assert [name for name in one if name in other] == [name for name in other if name in one]


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs the command diff")
def test_the_diff_is_the_idea():
    command = ["diff", "ppo.py", "ppo_residual.py"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    hunks = re.split(r"^\d.*\n", text, flags=re.MULTILINE)[1:]
    assert 1 < len(hunks) <= 14 and len(re.findall("^[<>]", text, re.MULTILINE)) <= 91
    # a name of typing that only alpha_schedule needs
    allowed = "< from typing import Annotated\n---\n> from typing import Annotated, Literal\n"
    for hunk in hunks:
        assert re.search("base|residual", hunk, re.IGNORECASE) or hunk == allowed, hunk
    assert not re.search("base|residual", (ROOT / "ppo.py").read_text(), re.IGNORECASE)


def test_a_residual_on_nothing_is_pure_rl(no_evaluations, monkeypatch, tmp_path):
    losses = {}
    for name, flags in (
        ("ppo.py", ""),
        ("ppo_residual.py", "--base-policy zero --alpha 1 --no-base-input --residual-penalty 0"),
    ):
        script = run_script(name, f"{TINY[name]} {flags}", monkeypatch, tmp_path)
        events = EventAccumulator(str(script["run"].dir)).Reload()
        keys = [key for key in events.Tags()["scalars"] if key.startswith("losses/")]
        losses[name] = {key: [scalar.value for scalar in events.Scalars(key)] for key in keys}
        losses[name]["weights"] = [p.double().sum().item() for p in script["agent"].parameters()]
    assert losses["ppo.py"] == losses["ppo_residual.py"]
    assert len(losses["ppo.py"]["losses/policy_loss"]) == 2


def fresh_residual(module, alpha=0.5):
    torch.manual_seed(0)
    network = Agent if module is ppo_residual else sac_residual.Actor
    agent = network(OBS_DIM + 6, 6, 64, 0.5)
    return module.ResidualPolicy(module.AgentPolicy(agent), JacobianIKPolicy(), alpha, base_input=True), agent


@pytest.mark.parametrize("module", [ppo_residual, sac_residual])
def test_fresh_residual_is_the_base_action_for_action(module):
    policy, _ = fresh_residual(module)
    alone, corrected = (evaluation.play_episodes(p, range(7, 11)) for p in (JacobianIKPolicy(), policy))
    for name in ("success", "return", "length", "final_distance_m", "final_yaw_error_rad"):
        np.testing.assert_array_equal(alone[name], corrected[name])


def test_the_residual_is_scaled_by_alpha_and_clipped():
    obs = np.random.default_rng(0).normal(size=(4, OBS_DIM)).astype(np.float32)
    for alpha in (0.0, 0.3, 1.0):
        policy, agent = fresh_residual(ppo_residual, alpha)
        torch.nn.init.constant_(agent.actor_mean[-1].bias, 5.0)  # beyond its bounds
        np.testing.assert_allclose(policy(obs), np.clip(policy.base_policy(obs) + alpha, -1, 1), atol=1e-6)
        assert np.all(policy.residual_action == 1.0)


# Runs

CHECKPOINTS = [
    ("ppo.py", ""),
    ("ppo_residual.py", "--alpha 0.4 --ik-gain 0.4"),
    ("ppo_residual.py", "--base-policy il --il-checkpoint act.safetensors"),
    ("sac_residual.py", "--alpha-schedule linear --base-policy hybrid --hybrid-bases jacobian il "
     "--il-checkpoint act.safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "flags"), CHECKPOINTS)
def test_a_checkpoint_alone_is_the_policy_that_was_trained(name, flags, monkeypatch, tmp_path):
    shutil.copy(ROOT / "assets" / "act.safetensors", tmp_path)
    reported = []
    monkeypatch.setattr(evaluation, "report", lambda run, policy, checkpoint: reported.append((run.dir, policy)))
    run_script(name, f"{TINY[name]} --learning-rate 0.1 {flags}", monkeypatch, tmp_path)
    ((run_dir, in_process),) = reported
    Path("act.safetensors").unlink()
    from_file, task, checkpoint = evaluation.load_policy(run_dir / "last.safetensors")
    assert checkpoint["global_step"] == 32 and (run_dir / "best.safetensors").exists()
    if "alpha" in flags:
        assert from_file.alpha == (0.4 if "0.4" in flags else 1.0)
    one, other = (
        evaluation.play_episodes(p, range(2), partial(task, max_episode_steps=60)) for p in (in_process, from_file)
    )
    for key in ("return", "length", "moved_m", "residual_norm"):
        np.testing.assert_array_equal(one[key], other[key])
    assert (one["residual_norm"].min() > 0) == (name != "ppo.py")


@pytest.mark.parametrize("name", [name for name in TRAINING if TRAINING[name].Args.torch_threads > 1])
def test_torch_threads_that_wait_leave_busy_cores_to_others(name):
    command = [sys.executable, str(ROOT / name), "--help"]
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    if "GOMP" not in shown:
        pytest.skip("torch has other threads here than GCC's")
    assert "GOMP_SPINCOUNT = '1000'" in shown


@pytest.mark.parametrize("name", RL)
def test_same_seed_same_weights_whatever_the_threads_and_evaluations(name, monkeypatch, tmp_path):
    runs = []
    for threads, eval_freq in ((1, 1000), (2, 8)):
        flags = f"{TINY[name]} --num-threads {threads} --eval-freq {eval_freq} --seed 3"
        runs.append(run_script(name, flags, monkeypatch, tmp_path))
    assert len(runs[0]["run"].evaluations) < len(runs[1]["run"].evaluations)
    one, other = (run["actor" if name == "sac_residual.py" else "agent"].state_dict() for run in runs)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_writes_what_the_pages_say(monkeypatch, tmp_path):
    monkeypatch.setattr(gym.registry["PaperSquare-v0"], "max_episode_steps", 8)  # some end that were not cut short
    logged = {}
    for name in RL:
        run_dir = run_script(name, TINY[name], monkeypatch, tmp_path)["run"].dir
        files = {path.name for path in run_dir.iterdir()}
        assert {"args.json", "best.safetensors", "last.safetensors", "results.json", name} <= files
        assert json.loads((run_dir / "args.json").read_text())["num_envs"] == 2
        logged[name] = set(EventAccumulator(str(run_dir)).Reload().Tags()["scalars"])
    everything = set.union(*logged.values())
    for name, keys in logged.items():  # the same in all scripts, but what is the algorithm's or the residual's
        assert all(key.startswith(("losses/", "residual/")) for key in everything - keys), name
    groups = "charts|eval|losses|residual|reward|rollout|task|test|time"
    for name in TRAINING:  # their own tests find that the others log what they name
        everything |= set(re.findall(f'"((?:{groups})/\\w+)"', (ROOT / name).read_text()))
    pages = "\n".join(PAGES.values())
    documented = set(re.findall(f"`((?:{groups})/\\w+)`", pages))
    assert "`reward/<term>`" in pages
    assert documented == {key for key in everything if not key.startswith("reward/")}


def test_curves_leave_out_the_first_episodes_which_are_cut_short():
    episodes, never = runs.Episodes(2), np.zeros(2, dtype=bool)
    for lengths in ((1, 3), (4, 4)):  # each environment's first episode, its second
        for step in range(1, 5):
            ended = np.array([step == length for length in lengths])
            info = {"dist_to_goal": np.ones(2), "orientation_error": np.zeros(2), "physics_reset": never}
            infos = {"reward/time": np.ones(2)} | ({"final_info": info} if ended.any() else {})
            episodes.add(np.ones(2), never, ended, infos)
    # After its first step the first environment had three left of the round, and ended four steps into the next
    assert list(episodes.last["rollout/ep_len_mean"]) == [7.0, 5.0]


def test_a_terminal_that_cannot_show_a_name_loses_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    run_dir = run_script("ppo.py", f"{TINY['ppo.py']} --exp-name prüfung", monkeypatch, tmp_path)["run"].dir
    sys.stdout.flush()
    assert (run_dir / "results.json").exists() and b"pr\\xfcfung" in sys.stdout.buffer.getvalue()


def test_a_report_may_be_stopped_and_gone_on_with(monkeypatch, tmp_path, capsys):
    def stop(run, policy, checkpoint):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(evaluation, "report", stop)
        run_script("ppo.py", TINY["ppo.py"], patch, tmp_path)
    assert end.value.code == 128 + signal.SIGTERM
    run_dir = shlex.split(re.search("go on with: (.*)", capsys.readouterr().err)[1])[-1]
    script = run_script("ppo.py", f"--resume {run_dir}", monkeypatch, tmp_path)
    assert (tmp_path / run_dir / "results.json").exists() and script["global_step"] == 32


def test_the_projects_own_checkpoints_are_found_from_elsewhere(monkeypatch, tmp_path):
    with pytest.raises(SystemExit):
        run_script("record_demos.py", "--num-episodes 1 --num-threads 1", monkeypatch, tmp_path)
    assert (tmp_path / "demos" / "meta" / "info.json").exists()


@pytest.mark.parametrize("flags", ["--curriculum --no-anneal-lr", "--alpha-schedule linear --no-randomize"])
def test_schedules_end_where_they_should(flags, no_evaluations, monkeypatch, tmp_path):
    script = run_script("ppo_residual.py", f"{TINY['ppo_residual.py']} {flags}", monkeypatch, tmp_path)
    ((policy, checkpoint),) = no_evaluations
    start = EventAccumulator(str(script["run"].dir)).Reload().Scalars("charts/tape_half_size")[0].value
    assert start == pytest.approx(0.12 if "curriculum" in flags else 0.08)
    assert script["envs"].tape_half_size == checkpoint["env"]["kwargs"].get("tape_half_size", 0.08) == 0.08
    assert policy.alpha == (1.0 if "linear" in flags else 0.5)
    assert script["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-3 if "anneal" in flags else 5e-4)


@pytest.mark.parametrize(("flag", "left"), [("--anneal-lr", 0.5), ("--no-anneal-lr", 1.0)])
def test_sacs_step_sizes_fall_in_the_second_half(flag, left, no_evaluations, monkeypatch, tmp_path):
    flags = f"{TINY['sac_residual.py']} --total-timesteps 64 --num-envs 16 {flag}"  # 4 iterations, the last at 3 / 4
    script = run_script("sac_residual.py", flags, monkeypatch, tmp_path)
    for name in ("actor_optimizer", "q_optimizer", "temperature_optimizer"):
        assert script[name].param_groups[0]["lr"] == pytest.approx(left * 1e-3)
    logged = EventAccumulator(str(script["run"].dir)).Reload().Scalars("charts/learning_rate")
    assert logged[-1].value == pytest.approx(left * 1e-3)


def test_capture_video_films_the_last_policy_beside_its_base(monkeypatch, tmp_path):
    filmed = []
    monkeypatch.setattr(evaluation, "check_rendering", lambda: None)
    monkeypatch.setattr(evaluation, "film_episode", lambda *args: filmed.append(args))
    script = run_script("ppo_residual.py", f"{TINY['ppo_residual.py']} --capture-video", monkeypatch, tmp_path)
    ((policies, tasks, seed, path),) = filmed
    assert len(policies) == 2 and policies.keys() == tasks.keys() and path == script["run"].dir / "episode.mp4"
    assert seed == evaluation.TEST_SEED


@pytest.mark.parametrize("package", [None, types.ModuleType("wandb")], ids=["missing", "a folder of that name"])
def test_track_without_wandb_says_so_and_writes_nothing(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(runs.UserError, match="pip install wandb"):
        run_script("ppo_residual.py", f"{TINY['ppo_residual.py']} --track", monkeypatch, tmp_path)
    assert not list(tmp_path.iterdir())


BAD_TOGETHER = {  # flags that are allowed alone: what the message names
    "ppo.py --minibatch-size 1000": "--minibatch-size",
    "ppo_residual.py --total-timesteps 10": "--total-timesteps",
    "sac_residual.py --total-timesteps 5": "--total-timesteps",
    "sac_residual.py --buffer-size 20": "--buffer-size",
    "dagger.py --total-timesteps 10": "--total-timesteps",
    "act.py --n-action-steps 17": "--n-action-steps",
    "act.py --n-heads 5": "--n-heads",
    "diffusion_policy.py --chunk-size 9 --n-action-steps 4": "--chunk-size",
    "diffusion_policy.py --num-inference-steps 101": "--num-inference-steps",
}


@pytest.mark.parametrize("command", BAD_TOGETHER)
def test_flags_that_do_not_fit_each_other(command, capsys):
    name, *flags = command.split()
    with pytest.raises(SystemExit) as end:
        tyro.cli(TRAINING[name].Args, args=flags)
    assert end.value.code == 2 and BAD_TOGETHER[command] in capsys.readouterr().err


@pytest.mark.parametrize("name", RL)
def test_the_checkpoint_that_comes_with_a_script_solves_the_task(name):
    policy, task, _ = evaluation.load_policy((ROOT / "assets" / name).with_suffix(".safetensors"))
    success = evaluation.play_episodes(policy, range(40), task)["success"].mean()
    assert success >= 0.9


# What the pages say


def commands(text):
    """(script, flags) of each `python SCRIPT.py FLAGS` in a text, lines going on after a backslash or in backticks."""
    text = text.replace("\\\n", " ")
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda span: span[0].replace("\n", " "), text)
    found = re.findall(r"(?:\bpython3?|\btorchrun [^\n`]*?) ([\w./-]+\.py)\b([^\n&|#`;()]*)", text)
    return [(name, shlex.split(re.sub(r"\$\w+", "1", flags))) for name, flags in found]


def test_commands_parse_and_name_files_that_exist():
    texts = PAGES | {ROOT / name: ast.get_docstring(ast.parse((ROOT / name).read_text())) or "" for name in SCRIPTS}
    checked = 0
    for path, text in texts.items():
        copies = re.findall(r"\bcp \S+ (\S+\.py)", text)  # which another test makes, and runs
        for name, flags in commands(text):
            if name in copies:
                continue
            assert (ROOT / name).is_file(), f"{path}: {name}"
            for flag in flags:
                assert not flag.endswith(".pt") and (flag[:7] != "assets/" or list(ROOT.glob(flag))), f"{path}: {flag}"
            if name in SCRIPTS and "--help" not in flags:
                try:
                    tyro.cli(SCRIPTS[name].Args, args=flags)
                except SystemExit:
                    pytest.fail(f"{path}: python {name} {shlex.join(flags)}")
                checked += 1
    assert checked >= 20


def test_lengths_of_scripts_on_the_pages_are_about_right():
    for path, text in PAGES.items():
        for name, lines in re.findall(r"`(\w+\.py)`\W*\((\d+) lines", text):
            assert int(lines) == pytest.approx(len((ROOT / name).read_text().splitlines()), rel=0.05), (path, name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_help(name):
    for flag, (_, text) in flags_of(SCRIPTS[name].Args).items():
        assert len(text) > 5, flag


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("ppo_residual.py", 100_000), ("sac_residual.py", 30_000)])
def test_the_residual_learns_to_beat_its_base(name, steps, monkeypatch, tmp_path):
    """In two minutes on two cores; at these lengths two seeds of each beat the base by 0.4 or more."""
    flags = f"--total-timesteps {steps} --eval-freq 1000000 --test-episodes 100"
    run_dir = run_script(name, flags, monkeypatch, tmp_path)["run"].dir
    base, residual = json.loads((run_dir / "results.json").read_text())["policies"].values()
    assert residual["success_rate"] > base["success_rate"] + 0.3
