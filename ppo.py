"""PPO (arXiv 1707.06347) learns the task from nothing, by its raw actions, in CleanRL's shape.
In about four minutes on two cores, to 87 % of held-out episodes (10 seeds, 35 to 99 %):
    python ppo.py --num-envs 64 --minibatch-size 512 --total-timesteps 1000000 --reach-weight -1
The reach weight draws the finger to the sheet; `--init-std 1` in its place found it in one of two seeds.
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

from checkpoints import Stop, begin, fitting, make_run_dir, rebuild, restore, save_state
from env_paper_square import OBS, OBS_DIM, EnvArgs, env_kwargs, eval_kwargs
from eval import VALIDATION_SEED, check_rendering, report, validate
from flags import fail, find_device, find_processes, parse


@dataclass
class Args(EnvArgs):
    exp_name: str = Path(__file__).stem
    """first part of the run's name; everything it writes is under runs/NAME"""
    seed: int = 1
    """seed of the network, the exploration and the training episodes"""
    torch_threads: int = 1
    """torch's threads; more than one fights the physics for the cores of a small machine"""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """where the networks are; auto takes cuda where there is one"""
    compile: bool = False
    """compile the losses' forward and backward pass (torch.compile); pays off in long trainings only"""
    resume: str = ""
    """folder of a run, runs/NAME, that was stopped: go on with it, with its flags"""
    save_freq: int = 50_000
    """environment steps between saves of the state for --resume; it is also saved when the run is stopped"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_project: str = "paper-square"
    """project to log to with --track"""
    capture_video: bool = False
    """film one held-out episode at the end"""
    eval_freq: int = 50_000
    """environment steps between evaluations on held-out validation episodes"""
    eval_episodes: int = 100
    """episodes of each such evaluation"""
    test_episodes: int = 200
    """held-out test episodes of the table at the end"""
    curriculum: bool = False
    """shrink the square linearly from curriculum_start to tape_half_size over the first half of the training"""
    curriculum_start: float = 0.12
    """tape_half_size at the start of the curriculum, m"""

    # PPO
    total_timesteps: int = 500_000
    """environment steps to train for, over all environments"""
    num_envs: Annotated[int, tyro.conf.arg(aliases=["--n-envs"])] = 128
    """environments stepped together"""
    num_steps: Annotated[int, tyro.conf.arg(aliases=["--n-steps"])] = 32
    """steps of each environment per rollout"""
    minibatch_size: Annotated[int, tyro.conf.arg(aliases=["--batch-size"])] = 1024
    """samples per gradient step; must divide num_envs * num_steps"""
    update_epochs: Annotated[int, tyro.conf.arg(aliases=["--n-epochs"])] = 10
    """passes over each rollout, K"""
    learning_rate: float = 1e-3
    """step size of Adam"""
    anneal_lr: bool = True
    """anneal the step size linearly to zero"""
    gamma: float = 0.99
    """discount factor; turning the sheet pays off a hundred steps later"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip_coef: Annotated[float, tyro.conf.arg(aliases=["--clip-range"])] = 0.2
    """clipping range of the probability ratio, epsilon"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, c2"""
    max_grad_norm: float = 0.5
    """largest gradient norm, of actor and critic each, so that neither eats the other's"""
    reward_scale: float = 0.1
    """factor on the rewards that the agent sees, so that returns are of order one"""
    value_init: bool = True
    """start the critic at the first rewards' mean / (1 - gamma); at zero it would praise whatever it has not seen"""
    hidden_size: int = 64
    """width of the two hidden layers"""
    init_std: float = 0.4
    """standard deviation of the exploration at the start, in units of the action"""


def check_args(args):
    """Raise ValueError, one line for the user, for flags that do not fit each other."""
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.minibatch_size:
        raise ValueError(
            f"--minibatch-size must divide num_envs * num_steps = {args.num_envs} * {args.num_steps} = {batch_size}, "
            f"found {args.minibatch_size}"
        )
    if batch_size > 10_000_000:  # 2 GB
        raise ValueError(f"--num-envs times --num-steps must not exceed 10,000,000, found {batch_size:,}")
    if args.total_timesteps < batch_size:
        raise ValueError(
            f"--total-timesteps must be at least one rollout of {batch_size} steps, found {args.total_timesteps}"
        )
    if args.seed * args.num_envs >= VALIDATION_SEED - args.num_envs:
        raise ValueError(f"--seed times --num-envs must lie below {VALIDATION_SEED}, where held-out episodes begin")


def layer_init(layer, std=np.sqrt(2), bias_const=0.0):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


def mlp(input_dim, hidden_size, output_dim, std):
    return nn.Sequential(
        nn.Hardtanh(-5.0, 5.0),  # inputs are of order one, but joint_target_error reaches 100 when the arm pushes
        layer_init(nn.Linear(input_dim, hidden_size)),
        nn.Tanh(),
        layer_init(nn.Linear(hidden_size, hidden_size)),
        nn.Tanh(),
        layer_init(nn.Linear(hidden_size, output_dim), std=std),
    )


class Agent(nn.Module):
    def __init__(self, obs_dim, action_dim, hidden_size, init_std):
        super().__init__()
        self.critic = mlp(obs_dim, hidden_size, 1, std=1.0)
        self.actor_mean = mlp(obs_dim, hidden_size, action_dim, std=0.0)  # starts at zero
        self.actor_logstd = nn.Parameter(torch.full((1, action_dim), float(np.log(init_std))))

    def get_value(self, x):
        return self.critic(x).flatten()

    def get_action_and_value(self, x, action=None, noise=None):
        mean = self.actor_mean(x)
        probs = Normal(mean, self.actor_logstd.exp().expand_as(mean), validate_args=False)
        if action is None:
            action = mean + probs.stddev * noise
        return action, probs.log_prob(action).sum(1), probs.entropy().sum(1), self.get_value(x)


class AgentPolicy:
    """The agent alone, `policy(obs) -> action`: by its mean, unless `sample`."""

    def __init__(self, agent, sample=False):
        self.agent, self.sample = agent, sample

    def __call__(self, obs):
        x = torch.from_numpy(obs).to(self.agent.actor_logstd.device)
        with torch.inference_mode():
            mean = self.agent.actor_mean(x)
            action = torch.normal(mean, self.agent.actor_logstd.exp().expand_as(mean)) if self.sample else mean
        return action.clamp(-1.0, 1.0).cpu().numpy()

    def reset(self, mask):
        pass


def make_checkpoint(args, agent, global_step):
    """Everything that `make_policy` and eval.py need, as torch.load(weights_only=True) accepts it."""
    return {
        "script": Path(__file__).stem,
        "args": asdict(args),
        "env_kwargs": eval_kwargs(args),
        "obs_names": list(OBS),
        "model": agent.state_dict(),
        "global_step": global_step,
    }


def make_policy(checkpoint, sample=False, device="cpu"):
    """Rebuild the policy from a checkpoint alone, networks on `device`; raises ValueError if its parts do not fit."""
    try:
        args = Args(**checkpoint["args"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"checkpoint does not fit {Path(__file__).name}: {error}") from error
    agent = rebuild(lambda: Agent(OBS_DIM, 6, args.hidden_size, args.init_std), checkpoint["model"])
    return AgentPolicy(agent.to(device), sample)


def compute_gae(rewards, values, dones, next_value, gamma, gae_lambda):
    """Advantages and returns, (num_steps, num_envs) each; dones[t] says that the episode ended with step t.

    The last value of a truncated episode must already be in its last reward (arXiv 1712.00378).
    """
    advantages = torch.zeros_like(rewards)
    lastgaelam = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        nextvalues = next_value if t == len(rewards) - 1 else values[t + 1]
        nextnonterminal = 1.0 - dones[t]
        delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
    return advantages, advantages + values


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
        if args.num_envs % world_size or args.minibatch_size % world_size:
            raise ValueError(f"--num-envs and --minibatch-size must be divisible by the {world_size} processes")
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
    next_obs = torch.from_numpy(next_obs)
    obs_dim, action_dim = next_obs.shape[1], envs.single_action_space.shape[0]
    agent = Agent(obs_dim, action_dim, args.hidden_size, args.init_std).to(device)
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    actor_parameters = [*agent.actor_mean.parameters(), agent.actor_logstd]
    critic_parameters = list(agent.critic.parameters())

    # Storage
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    obs = torch.zeros((args.num_steps, num_envs, obs_dim))
    actions = torch.zeros((args.num_steps, num_envs, action_dim))
    logprobs = torch.zeros((args.num_steps, num_envs))
    rewards = torch.zeros((args.num_steps, num_envs))
    dones = torch.zeros((args.num_steps, num_envs))
    values = torch.zeros((args.num_steps, num_envs))

    # Evaluation on validation episodes, before the first update and every eval_freq steps
    evaluations = []

    def evaluate(global_step):
        checkpoint = make_checkpoint(args, agent, global_step)
        policy, elapsed = make_policy(checkpoint, device=device), time.perf_counter() - start_time
        row = validate(policy, checkpoint, args.eval_episodes, elapsed, evaluations, run_dir)
        for key, value in row.items():
            writer.add_scalar(f"eval/{key}", value, global_step)
        writer.add_scalar("time/eval", evaluations[-1]["eval_seconds"], global_step)

    # torch.compile, of what the update differentiates
    get_action_and_value = torch.compile(agent.get_action_and_value) if args.compile else agent.get_action_and_value

    start_time = time.perf_counter()
    global_step = 0
    episode_returns = np.zeros(num_envs)
    episode_lengths = np.zeros(num_envs)
    physics_resets = 0
    last_episodes = defaultdict(lambda: deque(maxlen=100))

    # The state that --resume goes on from
    parts = {"agent": agent, "optimizer": optimizer}

    def make_state():
        own = {  # of this process
            "envs": envs.state_dict(),
            "next_obs": next_obs,
            "episodes": [episode_returns, episode_lengths],
            "physics_resets": physics_resets,
            "last_episodes": dict(last_episodes),
        }
        return {
            "script": Path(__file__).stem,
            "args": asdict(args),
            "global_step": global_step,
            "seconds": time.perf_counter() - start_time,
            "evaluations": evaluations,
            "rng": torch.get_rng_state(),
            **{name: part.state_dict() for name, part in parts.items()},
            "processes": gather_objects(own),
        }

    if state:
        with fitting(run_dir):
            if len(state["processes"]) != world_size:
                raise ValueError(f"it takes {len(state['processes'])} processes, as before")
            restore(parts, state, make_state())
            torch.set_rng_state(state["rng"])
            global_step, evaluations = state["global_step"], state["evaluations"]
            start_time -= state["seconds"]
            own = state["processes"][rank]
            envs.load_state_dict(own["envs"])
            next_obs[:] = own["next_obs"]
            episode_returns[:], episode_lengths[:] = map(np.asarray, own["episodes"])
            physics_resets = own["physics_resets"]
            for key, last in own["last_episodes"].items():
                last_episodes[key].extend(last)
    elif rank == 0:
        evaluate(0)
    bar = tqdm(total=num_iterations * batch_size, initial=global_step, unit="step", unit_scale=True, disable=rank > 0)
    stop = Stop()

    for iteration in range(global_step // batch_size + 1, num_iterations + 1):
        # Save the state now and then, and if asked to stop
        stopping = gather(torch.tensor([stop.number])).max().item()
        if stopping or global_step % args.save_freq < batch_size:
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
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1.0 - progress) * args.learning_rate
        if args.curriculum:
            share = max(0.0, 1.0 - 2.0 * progress)
            envs.tape_half_size = args.tape_half_size + share * (args.curriculum_start - args.tape_half_size)

        # Rollout
        collect_start = time.perf_counter()
        step_sums = defaultdict(float)
        for step in range(args.num_steps):
            global_step += args.num_envs
            obs[step] = next_obs
            noise = torch.randn(args.num_envs, action_dim)[own_envs]
            with torch.inference_mode():
                action, logprob, _, value = agent.get_action_and_value(next_obs.to(device), noise=noise.to(device))
            actions[step], logprobs[step], values[step] = action, logprob, value
            action = action.clamp(-1.0, 1.0).cpu().numpy()

            next_obs, reward, terminations, truncations, infos = envs.step(action)
            done = terminations | truncations

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

            reward = args.reward_scale * reward
            if args.value_init and global_step == args.num_envs:  # the first step
                offset = gather(torch.from_numpy(reward)).numpy().mean() / (1.0 - args.gamma)
                values[step] += offset
                with torch.no_grad():
                    agent.critic[-1].bias += offset

            # Truncation is not termination: the value of the last observation stands in for what would have come
            if truncations.any():
                final_obs = np.stack(infos["final_obs"][truncations])
                final_obs = torch.from_numpy(final_obs).to(device)
                with torch.inference_mode():
                    reward[truncations] += args.gamma * agent.get_value(final_obs).cpu().numpy()
            rewards[step], dones[step] = torch.from_numpy(reward), torch.from_numpy(done)

            next_obs = torch.from_numpy(next_obs)

        # Advantages
        update_start = time.perf_counter()
        with torch.inference_mode():
            next_value = agent.get_value(next_obs.to(device)).cpu()
        advantages, returns = compute_gae(rewards, values, dones, next_value, args.gamma, args.gae_lambda)

        # Update
        b_obs, b_actions, b_logprobs, b_advantages, b_returns, b_values = (
            gather(x, 1).flatten(0, 1).to(device) for x in (obs, actions, logprobs, advantages, returns, values)
        )
        for _epoch in range(args.update_epochs):
            b_inds = torch.randperm(batch_size).to(device)
            for mb_inds in b_inds.split(args.minibatch_size):
                mb_advantages = b_advantages[mb_inds]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                mb_inds, mb_advantages = mb_inds[own_samples], mb_advantages[own_samples]

                _, newlogprob, entropy, newvalue = get_action_and_value(b_obs[mb_inds], b_actions[mb_inds])
                logratio = newlogprob - b_logprobs[mb_inds]
                ratio = logratio.exp()
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()
                v_loss = 0.5 * (newvalue - b_returns[mb_inds]).square().mean()
                entropy_loss = entropy.mean()
                loss = pg_loss - args.ent_coef * entropy_loss + v_loss

                optimizer.zero_grad()
                loss.backward()
                average_gradients(agent.parameters())
                nn.utils.clip_grad_norm_(actor_parameters, args.max_grad_norm)
                nn.utils.clip_grad_norm_(critic_parameters, args.max_grad_norm)
                optimizer.step()
        now = time.perf_counter()
        if rank > 0:
            continue

        # Logging, of the last minibatch and of the rollout; of several processes' only the first one's share
        with torch.no_grad():
            old_approx_kl, approx_kl = -logratio.mean(), (ratio - 1.0 - logratio).mean()
            clipfrac = ((ratio - 1.0).abs() > args.clip_coef).float().mean()
            explained_var = 1.0 - (b_returns - b_values).var() / b_returns.var()
        scalars = {
            **{key: np.mean(last) for key, last in last_episodes.items() if last},
            **{key: total * world_size / batch_size for key, total in step_sums.items()},
            "task/physics_resets": physics_resets,
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/tape_half_size": envs.tape_half_size,
            "charts/std": agent.actor_logstd.exp().mean().item(),
            "charts/SPS": batch_size / (now - collect_start),
            "losses/value_loss": v_loss.item(),
            "losses/policy_loss": pg_loss.item(),
            "losses/entropy": entropy_loss.item(),
            "losses/old_approx_kl": old_approx_kl.item(),
            "losses/approx_kl": approx_kl.item(),
            "losses/clipfrac": clipfrac.item(),
            "losses/explained_variance": explained_var.item(),
            "time/collect": update_start - collect_start,
            "time/update": now - update_start,
        }
        for key, scalar in scalars.items():
            writer.add_scalar(key, scalar, global_step)

        if global_step >= args.eval_freq * len(evaluations) or iteration == num_iterations:
            evaluate(global_step)
        bar.update(batch_size)
        success = scalars.get("rollout/success_rate", 0.0)
        bar.set_postfix(success=f"{success:.2f}", eval=f"{evaluations[-1]['success_rate']:.2f}")
    bar.close()
    envs.close()

    # The result, on test episodes, which nothing was chosen by
    if rank == 0:
        checkpoint = make_checkpoint(args, agent, global_step)
        policy = make_policy(checkpoint, device=device)
        results = report(policy, checkpoint, args.test_episodes, evaluations, run_dir, film=args.capture_video)
        writer.close()
