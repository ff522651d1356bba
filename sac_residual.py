"""Residual SAC: a frozen base policy half-solves the task, a small network trained with SAC corrects it.

    action = clip(base_action + alpha * residual_action, -1, 1)

Soft actor-critic (arXiv 1812.05905) with what the literature found to matter, each a flag with its source. Differs from
ppo_residual.py in the algorithm only. `--base-policy zero --alpha 1` is plain SAC.

    python sac_residual.py      # 3 minutes on two cores: base 39 %, residual 99 % of held-out episodes
"""

import os
import time
from collections import defaultdict, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.optim as optim
import tyro
from torch.distributions.normal import Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from base_policies import BaseArgs, base_state, make_base
from checkpoints import Stop, begin, fitting, make_run_dir, rebuild, restore, save_state
from env_paper_square import OBS, OBS_DIM, EnvArgs, env_kwargs, eval_kwargs
from eval import VALIDATION_SEED, check_rendering, report, validate
from flags import fail, find_device, find_processes, parse


@dataclass
class Args(EnvArgs, BaseArgs):
    exp_name: str = Path(__file__).stem
    """first part of the run's name; everything it writes is under runs/NAME"""
    seed: int = 1
    """seed of the network, the exploration and the training episodes"""
    torch_threads: int = 1
    """torch's threads; more than one fights the physics for the cores of a small machine"""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """where the networks are; auto takes cuda where there is one"""
    resume: str = ""
    """folder of a run, runs/NAME, that was stopped: go on with it, with its flags"""
    save_freq: int = 10_000
    """environment steps between saves of the state for --resume; it is also saved when the run is stopped"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_project: str = "paper-square"
    """project to log to with --track"""
    capture_video: bool = False
    """film one held-out episode at the end"""
    eval_freq: int = 5_000
    """environment steps between evaluations on held-out validation episodes"""
    eval_episodes: int = 100
    """episodes of each such evaluation"""
    test_episodes: int = 200
    """held-out test episodes of the table at the end"""
    curriculum: bool = False
    """shrink the square linearly from curriculum_start to tape_half_size over the first half of the training"""
    curriculum_start: float = 0.12
    """tape_half_size at the start of the curriculum, m"""

    # SAC
    total_timesteps: int = 60_000
    """environment steps to train for, over all environments"""
    num_envs: Annotated[int, tyro.conf.arg(aliases=["--n-envs"])] = 16
    """environments stepped together"""
    buffer_size: int = 200_000
    """transitions that the replay buffer holds, over all environments"""
    batch_size: int = 256
    """transitions per gradient step"""
    utd: float = 0.5
    """update-to-data ratio: gradient steps per environment step (arXiv 2509.19301)"""
    learning_rate: float = 1e-3
    """step size of Adam, for actor, critics and temperature"""
    gamma: float = 0.99
    """discount factor; turning the sheet pays off a hundred steps later"""
    tau: float = 0.005
    """share of the critics that goes into their targets at each gradient step"""
    n_step: int = 3
    """rewards that are summed before the critics take over (arXiv 2509.19301)"""
    policy_frequency: int = 2
    """gradient steps of the critics per gradient step of the actor"""
    layer_norm: bool = True
    """layer normalisation in the critics (arXiv 2302.02948, arXiv 2602.10539)"""
    autotune: bool = True
    """tune the temperature towards the target entropy (arXiv 1812.05905)"""
    target_entropy_scale: float = 1.0
    """target entropy, in units of minus the number of action dimensions"""
    temperature: float = 0.01
    """temperature, the weight of the entropy; with autotune, where it starts"""
    reward_scale: float = 0.1
    """factor on the rewards that the agent sees, so that returns are of order one"""
    hidden_size: int = 128
    """width of the two hidden layers"""
    init_std: float = 0.4
    """standard deviation of the exploration at the start, in units of the action, before the tanh"""

    # the residual
    alpha: float = 0.5
    """authority of the residual, from 0 to 1"""
    alpha_schedule: Literal["constant", "linear"] = "constant"
    """linear: alpha goes from alpha_start to alpha_end over the training"""
    alpha_start: float = 0.3
    """alpha at the start of the linear schedule"""
    alpha_end: float = 1.0
    """alpha at the end of the linear schedule"""
    residual_penalty: float = 0.001
    """reward lost per squared norm of the residual action, each step"""
    base_input: bool = True
    """show the base action to actor and critic"""
    zero_init: bool = True
    """start the mean of the residual at zero (arXiv 1812.06298)"""
    learning_starts: int = 5_000
    """environment steps at the start in which the base acts, and nothing is learned (arXiv 2602.10539)"""
    warmup_std: float = 0.3
    """standard deviation of the residual in those steps, so that they tell what it does (arXiv 2509.19301)"""
    prog_explore: int = 0
    """H: after t steps the residual acts with probability t / H, otherwise the base alone (arXiv 2412.13630)"""


def check_args(args):
    """Raise ValueError, one line for the user, for flags that do not fit each other."""
    if args.total_timesteps < args.num_envs:
        raise ValueError(f"--total-timesteps must be at least --num-envs {args.num_envs}, found {args.total_timesteps}")
    if args.buffer_size < args.num_envs * args.n_step:
        raise ValueError(f"--buffer-size must hold n_step steps of each environment, found {args.buffer_size}")
    if args.seed * args.num_envs >= VALIDATION_SEED - args.num_envs:
        raise ValueError(f"--seed times --num-envs must lie below {VALIDATION_SEED}, where held-out episodes begin")
    make_base(args)  # a base that cannot be built is an error now, before anything is written


def alpha_at(args, global_step):
    """The authority of the residual after `global_step` steps of the training."""
    if args.alpha_schedule == "constant":
        return args.alpha
    return args.alpha_start + global_step / args.total_timesteps * (args.alpha_end - args.alpha_start)


def append_base(obs, base_action, base_input):
    """Observation (num_envs, obs_dim) and base action (num_envs, 6) as one, float32, if actor and critic see both."""
    return np.concatenate([obs, base_action], axis=1, dtype=np.float32, casting="same_kind") if base_input else obs


class ResidualPolicy:
    """The frozen base, corrected by the agent: `policy(obs) -> action`."""

    def __init__(self, agent_policy, base_policy, alpha, base_input):
        self.agent_policy, self.base_policy, self.alpha, self.base_input = agent_policy, base_policy, alpha, base_input

    def __call__(self, obs):
        base_action = self.base_policy(obs)
        self.residual_action = self.agent_policy(append_base(obs, base_action, self.base_input))
        return np.clip(base_action + self.alpha * self.residual_action, -1.0, 1.0)

    def reset(self, mask):
        self.base_policy.reset(mask)


def layer_init(layer, std=np.sqrt(2), bias_const=0.0):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


def mlp(input_dim, hidden_size, output_dim, layer_norm=False):
    norm = nn.LayerNorm if layer_norm else nn.Identity
    return nn.Sequential(
        nn.Hardtanh(-5.0, 5.0),  # inputs are of order one, but joint_target_error reaches 100 when the arm pushes
        nn.Linear(input_dim, hidden_size),
        norm(hidden_size),
        nn.ReLU(),
        nn.Linear(hidden_size, hidden_size),
        norm(hidden_size),
        nn.ReLU(),
        nn.Linear(hidden_size, output_dim),
    )


class SoftQNetwork(nn.Module):
    """Value of doing the action (the base's and the residual's together) where the actor sees x."""

    def __init__(self, obs_dim, action_dim, hidden_size, layer_norm):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, hidden_size, 1, layer_norm)

    def forward(self, x, action):
        return self.net(torch.cat([x, action], 1)).flatten()


class Actor(nn.Module):
    LOG_STD_MIN, LOG_STD_MAX = -5.0, 1.0

    def __init__(self, obs_dim, action_dim, hidden_size, init_std, zero_init=True):
        super().__init__()
        self.net = mlp(obs_dim, hidden_size, 2 * action_dim)
        with torch.no_grad():
            if zero_init:
                self.net[-1].weight.zero_()
                self.net[-1].bias.zero_()
            self.net[-1].bias[action_dim:] = float(np.log(init_std))

    def forward(self, x):
        mean, log_std = self.net(x).chunk(2, 1)
        return mean, log_std.clamp(self.LOG_STD_MIN, self.LOG_STD_MAX)

    def get_action(self, x, noise):
        """Action (batch, action_dim) in (-1, 1) by standard normal noise, and the logarithm of its density (batch,)."""
        mean, log_std = self(x)
        probs = Normal(mean, log_std.exp(), validate_args=False)
        y = mean + probs.stddev * noise
        log_det = 2.0 * (np.log(2.0) - y - nn.functional.softplus(-2.0 * y))  # log(1 - tanh(y)^2)
        return y.tanh(), (probs.log_prob(y) - log_det).sum(1)


class AgentPolicy:
    """The agent alone, `policy(obs) -> action`: by its mean, unless `sample`."""

    def __init__(self, actor, sample=False):
        self.actor, self.sample = actor, sample

    def __call__(self, obs):
        x = torch.from_numpy(obs).to(self.actor.net[-1].weight.device)
        with torch.inference_mode():
            mean, log_std = self.actor(x)
            action = torch.normal(mean, log_std.exp()) if self.sample else mean
        return action.tanh().cpu().numpy()

    def reset(self, mask):
        pass


class ReplayBuffer:
    """The last `capacity` steps of each environment, in preallocated tensors (capacity, num_envs, ...)."""

    def __init__(self, capacity, num_envs, obs_dim, action_dim):
        self.capacity, self.num_envs, self.pos, self.size = capacity, num_envs, 0, 0
        self.obs, self.next_obs = (torch.zeros((capacity, num_envs, obs_dim)) for _ in range(2))
        self.base_actions, self.actions, self.next_base_actions = (
            torch.zeros((capacity, num_envs, action_dim)) for _ in range(3)
        )
        self.rewards, self.terminations, self.dones = (torch.zeros((capacity, num_envs)) for _ in range(3))

    def add(self, **step):
        """One step of every environment, arrays (num_envs, ...) by name; next_obs is an ended episode's own last."""
        for name, value in step.items():
            getattr(self, name)[self.pos] = torch.as_tensor(value)
        self.pos = (self.pos + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def state_dict(self):
        tensors = {name: x[: self.size].clone() for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return {"pos": self.pos, "size": self.size, **tensors}

    def load_state_dict(self, state):
        """Raises ValueError for another buffer's state."""
        if not (0 <= state["pos"] < self.capacity and 0 <= state["size"] <= self.capacity):
            raise ValueError(f"its buffer holds more than {self.capacity} steps")
        for name, x in vars(self).items():
            if isinstance(x, torch.Tensor):
                x[: state["size"]] = state[name]
        self.pos, self.size = state["pos"], state["size"]

    def sample(self, batch_size, n_step, gamma):
        """A batch by name; `returns` are of n steps, fewer where the episode or the buffer ends before."""
        start = torch.randint(self.size, (batch_size,))
        env = torch.randint(self.num_envs, (batch_size,))
        window = (start[:, None] + torch.arange(n_step)) % self.capacity  # (batch_size, n_step)
        newest = (self.pos - 1) % self.capacity
        ends = (self.dones[window, env[:, None]] > 0) | (window == newest)
        returns, length = n_step_returns(self.rewards[window, env[:, None]], ends, gamma)
        last = window[torch.arange(batch_size), length - 1]
        return {
            "obs": self.obs[start, env],
            "base_actions": self.base_actions[start, env],
            "actions": self.actions[start, env],
            "returns": returns,
            "next_obs": self.next_obs[last, env],
            "next_base_actions": self.next_base_actions[last, env],
            "discounts": gamma**length * (1.0 - self.terminations[last, env]),  # truncation is not termination
        }


def n_step_returns(rewards, ends, gamma):
    """Discounted sums (batch,) of rewards (batch, n) up to the first of ends (batch, n), and their lengths (batch,)."""
    before = torch.cat([torch.ones_like(ends[:, :1]), ~ends[:, :-1]], 1).cumprod(1)
    discounts = gamma ** torch.arange(rewards.shape[1])
    return (before * discounts * rewards).sum(1), before.sum(1)


def make_checkpoint(args, actor, global_step):
    """Everything that `make_policy` and eval.py need, as torch.load(weights_only=True) accepts it."""
    return {
        "script": Path(__file__).stem,
        "args": asdict(args),
        "env_kwargs": eval_kwargs(args),
        "obs_names": list(OBS),
        "model": actor.state_dict(),
        "global_step": global_step,
        "base": base_state(args),
    }


def make_policy(checkpoint, sample=False, device="cpu"):
    """Rebuild the policy from a checkpoint alone, networks on `device`; raises ValueError if its parts do not fit."""
    try:
        args = Args(**checkpoint["args"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"checkpoint does not fit {Path(__file__).name}: {error}") from error
    actor = rebuild(
        lambda: Actor(OBS_DIM + 6 * args.base_input, 6, args.hidden_size, args.init_std), checkpoint["model"]
    )
    policy = AgentPolicy(actor.to(device), sample)
    base_policy = make_base(args, checkpoint.get("base"), device)
    alpha = alpha_at(args, checkpoint["global_step"])
    return ResidualPolicy(policy, base_policy, alpha, args.base_input)


if __name__ == "__main__":
    args, run_dir, state = begin(parse(Args), Path(__file__).stem)

    # Several processes, by torchrun: each steps its share of the environments and differentiates its share of every
    # batch. All draw the same random numbers and hold the same weights; the first one evaluates and writes.
    rank, world_size = find_processes()
    num_envs = args.num_envs // world_size
    own_envs, own_samples = slice(rank * num_envs, (rank + 1) * num_envs), slice(rank, None, world_size)
    num_threads = args.num_threads
    if world_size > 1:
        num_threads = num_threads or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def gather(x, dim=0):
        """The tensors x of all processes as one, along dim."""
        if world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim)

    def average_gradients(parameters):
        """Replace the gradients by their means over the processes."""
        if world_size > 1:
            gradients = [parameter.grad for parameter in parameters]
            total = nn.utils.parameters_to_vector(gradients)
            dist.all_reduce(total)
            nn.utils.vector_to_parameters(total / world_size, gradients)

    def gather_objects(x):
        """The objects x of all processes, a list."""
        parts = [x] * world_size
        if world_size > 1:
            dist.all_gather_object(parts, x)
        return parts

    try:
        check_args(args)
        if args.num_envs % world_size or args.batch_size % world_size:
            raise ValueError(f"--num-envs and --batch-size must be divisible by the {world_size} processes")
        device = find_device(args.device)
        if args.capture_video:
            check_rendering()
        if args.track:
            import wandb
        if rank == 0 and state is None:
            make_run_dir(run_dir, Path(__file__).stem, asdict(args))
    except ImportError:
        fail("--track needs Weights & Biases: pip install wandb")
    except (ValueError, RuntimeError, OSError) as error:
        fail(str(error))
    if rank == 0:
        if args.track:
            names = {"id": run_dir.name, "name": run_dir.name, "resume": "allow"}  # after --resume, the same run
            wandb.init(project=args.wandb_project, config=asdict(args), sync_tensorboard=True, **names)
        writer = SummaryWriter(run_dir, purge_step=state["global_step"] + 1 if state else 0)
        if not state:
            writer.add_text(
                "args", "\n".join(["|flag|value|", "|-|-|", *(f"|{k}|{v}|" for k, v in asdict(args).items())])
            )

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)

    envs = gym.make_vec(
        "PaperSquare-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",  # autoreset mode SAME_STEP
        **{**env_kwargs(args), "num_threads": num_threads},
    )
    # The first episodes end early, each at another time: in step, every rollout would hold one phase of an episode only
    episode_steps = np.arange(args.num_envs) * envs.max_episode_steps // args.num_envs
    first_seed = args.seed * args.num_envs + own_envs.start
    next_obs, _ = envs.reset(seed=first_seed, options={"episode_steps": episode_steps[own_envs]})
    base_policy = make_base(args, device=device)
    base_policy.reset(np.ones(num_envs, dtype=bool))
    base_action = base_policy(next_obs)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    x_dim = obs_dim + (action_dim if args.base_input else 0)
    actor = Actor(x_dim, action_dim, args.hidden_size, args.init_std, args.zero_init).to(device)
    qf1, qf2, qf1_target, qf2_target = (
        SoftQNetwork(x_dim, action_dim, args.hidden_size, args.layer_norm).to(device) for _ in range(4)
    )
    qf1_target.load_state_dict(qf1.state_dict())
    qf2_target.load_state_dict(qf2.state_dict())
    actor_parameters = list(actor.parameters())
    q_parameters = [*qf1.parameters(), *qf2.parameters()]
    q_target_parameters = [*qf1_target.parameters(), *qf2_target.parameters()]
    log_temperature = torch.full((1,), float(np.log(args.temperature)), device=device, requires_grad=True)
    target_entropy = -args.target_entropy_scale * action_dim
    actor_optimizer = optim.Adam(actor_parameters, lr=args.learning_rate, fused=True)
    q_optimizer = optim.Adam(q_parameters, lr=args.learning_rate, fused=True)
    temperature_optimizer = optim.Adam([log_temperature], lr=args.learning_rate, fused=True)
    rb = ReplayBuffer(args.buffer_size // args.num_envs, args.num_envs, obs_dim, action_dim)

    # Evaluation on validation episodes, before the first update and every eval_freq steps
    evaluations = []

    def evaluate(global_step):
        checkpoint = make_checkpoint(args, actor, global_step)
        policy, elapsed = make_policy(checkpoint, device=device), time.perf_counter() - start_time
        row = validate(policy, checkpoint, args.eval_episodes, elapsed, evaluations, run_dir)
        for key, value in row.items():
            writer.add_scalar(f"eval/{key}", value, global_step)
        writer.add_scalar("time/eval", evaluations[-1]["eval_seconds"], global_step)

    start_time = time.perf_counter()
    global_step = 0
    episode_returns = np.zeros(num_envs)
    episode_lengths = np.zeros(num_envs)
    physics_resets = 0
    last_episodes = defaultdict(lambda: deque(maxlen=100))
    step_sums, losses = defaultdict(float), {}
    num_iterations = args.total_timesteps // args.num_envs
    gradient_steps, updates_due, last_log = 0, 0.0, 0

    # The state that --resume goes on from
    parts = {"actor": actor, "qf1": qf1, "qf2": qf2, "qf1_target": qf1_target, "qf2_target": qf2_target, "rb": rb}
    parts |= {"actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer}
    parts |= {"temperature_optimizer": temperature_optimizer}

    def make_state():
        own = {  # of this process
            "envs": envs.state_dict(),
            "base": [base_policy.state_dict(), base_action],
            "next_obs": next_obs,
            "episodes": [episode_returns, episode_lengths],
            "physics_resets": physics_resets,
            "last_episodes": dict(last_episodes),
            "log": [last_log, step_sums, {key: float(loss) for key, loss in losses.items()}],
        }
        return {
            "script": Path(__file__).stem,
            "args": asdict(args),
            "global_step": global_step,
            "seconds": time.perf_counter() - start_time,
            "evaluations": evaluations,
            "rng": torch.get_rng_state(),
            **{name: part.state_dict() for name, part in parts.items()},
            "log_temperature": log_temperature.detach(),
            "updates": [gradient_steps, updates_due],
            "processes": gather_objects(own),
        }

    if state:
        with fitting(run_dir):
            if len(state["processes"]) != world_size:
                raise ValueError(f"it takes {len(state['processes'])} processes, as before")
            restore(parts, state, make_state())
            log_temperature.data[:] = state["log_temperature"]
            gradient_steps, updates_due = state["updates"]
            torch.set_rng_state(state["rng"])
            global_step, evaluations = state["global_step"], state["evaluations"]
            start_time -= state["seconds"]
            own = state["processes"][rank]
            envs.load_state_dict(own["envs"])
            base_policy.load_state_dict(own["base"][0])
            base_action[:] = np.asarray(own["base"][1])
            next_obs[:] = np.asarray(own["next_obs"])
            episode_returns[:], episode_lengths[:] = map(np.asarray, own["episodes"])
            physics_resets = own["physics_resets"]
            for key, last in own["last_episodes"].items():
                last_episodes[key].extend(last)
            last_log, sums, losses = own["log"]
            losses = {key: float(loss) for key, loss in losses.items()}  # TypeError for a list
            for key, total in sums.items():
                step_sums[key] += total
    elif rank == 0:
        evaluate(0)
    bar = tqdm(total=num_iterations * args.num_envs, initial=last_log, unit="step", unit_scale=True, disable=rank > 0)
    stop = Stop()

    for iteration in range(global_step // args.num_envs + 1, num_iterations + 1):
        # Save the state now and then, and if asked to stop
        stopping = gather(torch.tensor([stop.number])).max().item()
        if stopping or global_step % args.save_freq < args.num_envs:
            state = make_state()
            if rank == 0:
                writer.flush()
                save_state(state, run_dir)
        if stopping:
            bar.close()
            gather(torch.zeros(1))  # all wait for the first process
            stop.exit(run_dir)

        # Schedules
        progress = (iteration - 1) / num_iterations
        if args.curriculum:
            share = max(0.0, 1.0 - 2.0 * progress)
            envs.tape_half_size = args.tape_half_size + share * (args.curriculum_start - args.tape_half_size)

        # Act
        step_start = time.perf_counter()
        global_step += args.num_envs
        obs = next_obs
        warmup = global_step <= args.learning_starts
        noise = torch.randn(args.num_envs, action_dim)[own_envs]
        if warmup:
            residual_action = (args.warmup_std * noise).clamp(-1.0, 1.0).numpy()
        else:
            with torch.inference_mode():
                x = torch.from_numpy(append_base(obs, base_action, args.base_input)).to(device)
                residual_action = actor.get_action(x, noise.to(device))[0].cpu().numpy()
            if global_step < args.prog_explore:
                residual_action *= (torch.rand(args.num_envs, 1)[own_envs] < global_step / args.prog_explore).numpy()
        alpha = alpha_at(args, global_step)
        action = np.clip(base_action + alpha * residual_action, -1.0, 1.0)

        next_obs, reward, terminations, truncations, infos = envs.step(action)
        done = terminations | truncations

        # The price of the residual, and what to log of it
        penalty = args.residual_penalty * np.square(residual_action).sum(axis=1)
        reward = reward - penalty
        step_sums["residual/penalty"] -= penalty.sum()
        step_sums["residual/norm"] += np.linalg.norm(residual_action, axis=1).sum()
        step_sums["residual/base_norm"] += np.linalg.norm(base_action, axis=1).sum()
        step_sums["residual/alpha"] += alpha * num_envs
        last_episodes["residual/success_rate"].extend(terminations[done])

        episode_returns += reward
        episode_lengths += 1
        for info in (infos, infos.get("final_info", {})):
            for key, term in info.items():
                if key.startswith("reward/"):
                    step_sums[key] += term.sum()
        if done.any():
            last_episodes["rollout/ep_rew_mean"].extend(episode_returns[done])
            last_episodes["rollout/ep_len_mean"].extend(episode_lengths[done])
            last_episodes["rollout/success_rate"].extend(terminations[done])
            physics_resets += infos["final_info"]["physics_reset"].sum()
            last_episodes["task/dist_to_goal"].extend(infos["final_info"]["dist_to_goal"][done])
            last_episodes["task/orientation_error"].extend(infos["final_info"]["orientation_error"][done])
            episode_returns[done] = episode_lengths[done] = 0

        # Store; what follows the last step of an episode is its own last observation, not the next episode's first
        last_obs = next_obs.copy()
        if done.any():
            last_obs[done] = np.stack(infos["final_obs"][done])
        last_base_action = base_policy(last_obs)
        base_policy.reset(done)
        next_base_action = last_base_action.copy()
        if done.any():
            next_base_action[done] = base_policy(next_obs[done], done)
        transition = {
            "obs": obs,
            "base_actions": base_action,
            "actions": action,
            "rewards": args.reward_scale * reward,
            "next_obs": last_obs,
            "next_base_actions": last_base_action,
            "terminations": terminations,
            "dones": done,
        }
        rb.add(**{name: gather(torch.as_tensor(x)) for name, x in transition.items()})
        base_action = next_base_action

        # Update
        update_start = time.perf_counter()
        updates_due += 0.0 if warmup else args.utd * args.num_envs
        while updates_due >= 1.0:
            updates_due -= 1.0
            gradient_steps += 1
            data = rb.sample(args.batch_size, args.n_step, args.gamma)
            data = {name: x[own_samples].to(device) for name, x in data.items()}
            x, next_x = data["obs"], data["next_obs"]
            if args.base_input:
                x, next_x = torch.cat([x, data["base_actions"]], 1), torch.cat([next_x, data["next_base_actions"]], 1)
            temperature = log_temperature.exp().item()

            noise = torch.randn(args.batch_size, action_dim)[own_samples].to(device)
            with torch.no_grad():
                next_residual, next_logprob = actor.get_action(next_x, noise)
                next_action = (data["next_base_actions"] + alpha * next_residual).clamp(-1.0, 1.0)
                next_q = torch.min(qf1_target(next_x, next_action), qf2_target(next_x, next_action))
                next_q_value = data["returns"] + data["discounts"] * (next_q - temperature * next_logprob)
            qf1_loss = (qf1(x, data["actions"]) - next_q_value).square().mean()
            qf2_loss = (qf2(x, data["actions"]) - next_q_value).square().mean()
            q_optimizer.zero_grad()
            (qf1_loss + qf2_loss).backward()
            average_gradients(q_parameters)
            q_optimizer.step()
            losses |= {"losses/qf1_loss": qf1_loss.detach(), "losses/qf2_loss": qf2_loss.detach()}

            if gradient_steps % args.policy_frequency == 0:
                noise = torch.randn(args.batch_size, action_dim)[own_samples].to(device)
                residual, logprob = actor.get_action(x, noise)
                new_action = (data["base_actions"] + alpha * residual).clamp(-1.0, 1.0)
                min_q = torch.min(qf1(x, new_action), qf2(x, new_action))
                actor_loss = (temperature * logprob - min_q).mean()
                actor_optimizer.zero_grad()
                actor_loss.backward(inputs=actor_parameters)  # the critics' gradients would be for nothing
                average_gradients(actor_parameters)
                actor_optimizer.step()
                if args.autotune:
                    temperature_loss = -(log_temperature.exp() * (logprob.detach() + target_entropy)).mean()
                    temperature_optimizer.zero_grad()
                    temperature_loss.backward()
                    average_gradients([log_temperature])
                    temperature_optimizer.step()
                losses |= {"losses/qf_values": min_q.detach().mean(), "losses/policy_loss": actor_loss.detach()}
                losses |= {"losses/entropy": -logprob.detach().mean(), "losses/temperature": torch.tensor(temperature)}

            with torch.no_grad():
                for target, parameter in zip(q_target_parameters, q_parameters, strict=True):
                    target.lerp_(parameter, args.tau)
        now = time.perf_counter()
        step_sums["time/collect"] += update_start - step_start
        step_sums["time/update"] += now - update_start

        # Logging; of several processes' only the first one's share
        if rank > 0:
            continue
        num_steps = global_step - last_log
        if num_steps >= 1024 or iteration == num_iterations:
            seconds = {key: step_sums.pop(key) for key in ("time/collect", "time/update")}
            scalars = {
                **{key: np.mean(last) for key, last in last_episodes.items() if last},
                **{key: total * world_size / num_steps for key, total in step_sums.items()},
                **seconds,
                "task/physics_resets": physics_resets,
                "charts/learning_rate": args.learning_rate,
                "charts/tape_half_size": envs.tape_half_size,
                "charts/SPS": num_steps / sum(seconds.values()),
            }
            if "losses/policy_loss" in losses:
                x = torch.from_numpy(append_base(next_obs, base_action, args.base_input)).to(device)
                scalars |= {"charts/std": actor(x)[1].exp().mean().item(), **losses}
            for key, scalar in scalars.items():
                writer.add_scalar(key, scalar, global_step)
            step_sums.clear()
            last_log = global_step
            bar.update(num_steps)
            success = scalars.get("rollout/success_rate", 0.0)
            bar.set_postfix(success=f"{success:.2f}", eval=f"{evaluations[-1]['success_rate']:.2f}")
        if global_step >= args.eval_freq * len(evaluations) or iteration == num_iterations:
            evaluate(global_step)
    bar.close()
    envs.close()

    # The result, on test episodes, which nothing was chosen by
    if rank == 0:
        checkpoint = make_checkpoint(args, actor, global_step)
        policy = make_policy(checkpoint, device=device)
        results = report(policy, checkpoint, args.test_episodes, evaluations, run_dir, film=args.capture_video)
        writer.close()
