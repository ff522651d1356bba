"""Residual SAC: a frozen base policy half-solves the task, a small network trained with SAC corrects it.

    action = clip(base_action + alpha * residual_action, -1, 1)

Soft actor-critic (arXiv 1812.05905) with what the literature found to matter, each a flag with its source. Differs from
ppo_residual.py in the algorithm only. `--base-policy zero --alpha 1` is plain SAC.

    python sac_residual.py      # 2.5 minutes on two cores: base 40 %, residual 99 % of held-out episodes
"""

import time
from dataclasses import dataclass
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim
import tyro
from torch.distributions.normal import Normal

from base_policies import BaseArgs, make_base
from env_paper_square import EnvArgs, env_kwargs, eval_kwargs, state_of
from eval import report, validate
from lerobot_dataset import load_transitions
from runs import Episodes, Real, Run, RunArgs, Whole, env_of, find_device, flags_of, parse, rebuild


@dataclass
class Args(RunArgs, EnvArgs, BaseArgs):
    orientation_weight: Real[-1e4, 1e4] = -0.3
    """reward per rad between the sheet's yaw and a multiple of 90 degrees, each step"""
    reach_weight: Real[-1e4, 1e4] = -0.3
    """reward per m of the reach, from the hand to the sheet, each step; negative draws it there, level and pressing"""
    save_freq: Whole[1, 10**10] = 10_000
    """environment steps between saves of the state for --resume; it is also saved when the run is stopped"""
    eval_freq: Whole[1, 10**10] = 5_000
    """environment steps between evaluations on held-out validation episodes"""
    curriculum: bool = False
    """shrink the square linearly from curriculum_start to tape_half_size over the first half of the training"""
    curriculum_start: Real[0.001, 1] = 0.12
    """tape_half_size at the start of the curriculum, m"""

    # SAC
    total_timesteps: Whole[1, 10**10] = 60_000
    """environment steps to train for, over all environments"""
    num_envs: Annotated[Whole[1, 32_768], tyro.conf.arg(aliases=["--n-envs"])] = 16
    """environments stepped together"""
    buffer_size: Whole[1, 10**7] = 200_000
    """transitions that the replay buffer holds, over all environments"""
    batch_size: Whole[1, 65_536] = 256
    """transitions per gradient step"""
    utd: Real[1e-4, 100] = 0.5
    """update-to-data ratio: gradient steps per environment step (arXiv 2509.19301)"""
    learning_rate: Real[1e-12, 1] = 1e-3
    """step size of Adam, for actor, critics and temperature"""
    anneal_lr: bool = True
    """anneal the step sizes linearly to zero over the second half of the training, which settles the policy"""
    gamma: Real[0, 1] = 0.99
    """discount factor; turning the sheet pays off a hundred steps later"""
    tau: Real[1e-6, 1] = 0.005
    """share of the critics that goes into their targets at each gradient step"""
    n_step: Whole[1, 400] = 3
    """rewards that are summed before the critics take over (arXiv 2509.19301)"""
    policy_frequency: Whole[1, 10**6] = 2
    """gradient steps of the critics per gradient step of the actor"""
    layer_norm: bool = True
    """layer normalisation in the critics (arXiv 2302.02948, arXiv 2602.10539)"""
    autotune: bool = True
    """tune the temperature towards the target entropy (arXiv 1812.05905)"""
    target_entropy_scale: Real[-10, 10] = 1.0
    """target entropy, in units of minus the number of action dimensions"""
    temperature: Real[1e-9, 1e3] = 0.01
    """temperature, the weight of the entropy; with autotune, where it starts"""
    reward_scale: Real[1e-6, 1e3] = 0.1
    """factor on the rewards that the agent sees, so that returns are of order one"""
    hidden_size: Whole[1, 4096] = 128
    """width of the two hidden layers"""
    init_std: Real[1e-3, 10] = 0.4
    """standard deviation of the exploration at the start, in units of the action, before the tanh"""

    # the residual
    alpha: Real[0, 1] = 0.3
    """authority of the residual, from 0 to 1"""
    alpha_schedule: Literal["constant", "linear"] = "constant"
    """linear: alpha goes from alpha_start to alpha_end over the training"""
    alpha_start: Real[0, 1] = 0.3
    """alpha at the start of the linear schedule"""
    alpha_end: Real[0, 1] = 1.0
    """alpha at the end of the linear schedule"""
    residual_penalty: Real[0, 1e3] = 0.001
    """reward lost per squared norm of the residual action, each step"""
    base_input: bool = True
    """show the base action to actor and critic"""
    zero_init: bool = True
    """start the mean of the residual at zero (arXiv 1812.06298)"""
    learning_starts: Whole[0, 10**10] = 5_000
    """environment steps at the start in which the base acts, and nothing is learned (arXiv 2602.10539)"""
    warmup_std: Real[0, 10] = 0.3
    """standard deviation of the residual in those steps, so that they tell what it does (arXiv 2509.19301)"""
    prog_explore: Whole[0, 10**10] = 0
    """H: after t steps the residual acts with probability t / H, otherwise the base alone (arXiv 2412.13630)"""
    demos: str = ""
    """folder of demonstrations, as record_demos.py writes them, that fill half of each batch (arXiv 2302.02948)"""

    def __post_init__(self):
        super().__post_init__()
        if self.total_timesteps < self.num_envs:
            raise ValueError(f"--total-timesteps must be at least --num-envs {self.num_envs}")
        if self.buffer_size < self.num_envs * self.n_step:
            raise ValueError(f"--buffer-size must hold n_step steps of each environment, {self.num_envs * self.n_step}")


def alpha_at(args, global_step):
    """The authority of the residual after `global_step` steps of the training."""
    if args.alpha_schedule == "constant":
        return args.alpha
    return args.alpha_start + global_step / args.total_timesteps * (args.alpha_end - args.alpha_start)


def append_base(obs, base_action, base_input):
    """Observation (num_envs, obs_dim) and base action (num_envs, 6) as one, float32, if actor and critic see both."""
    obs = state_of(obs)
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
        self.agent_policy.reset(mask)


def mlp(input_dim, hidden_size, output_dim, layer_norm=False):
    norm = nn.LayerNorm if layer_norm else nn.Identity
    return nn.Sequential(
        nn.Hardtanh(-5.0, 5.0),  # inputs are of order one; what is farther off than any training need not be told apart
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
        x = torch.from_numpy(state_of(obs)).to(self.actor.net[-1].weight.device)
        with torch.inference_mode():
            mean, log_std = self.actor(x)
            action = torch.normal(mean, log_std.exp()) if self.sample else mean
        return action.tanh().cpu().numpy()

    def reset(self, mask):
        """Forget the episodes before, of the environments in the mask (num_envs,): nothing here, a memory in a copy."""


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
        """The part that is filled, for --resume."""
        tensors = {name: x[: self.size] for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return {"pos": self.pos, "size": self.size, **tensors}

    def load_state_dict(self, state):
        self.pos, self.size = state.pop("pos"), state.pop("size")
        for name, x in state.items():
            getattr(self, name)[: self.size] = x

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


def demo_buffer(demos, base_policy, reward_scale):
    """A buffer of the transitions that `load_transitions` returns, with what the base would have done in them."""
    demos |= {"base_actions": np.zeros_like(demos["actions"]), "next_base_actions": np.zeros_like(demos["actions"])}
    rb = ReplayBuffer(len(demos["obs"]), 1, demos["obs"].shape[1], demos["actions"].shape[1])
    fresh = True
    for k, done in enumerate(demos["dones"]):
        if fresh:
            base_policy.reset(np.ones(1, dtype=bool))
            demos["base_actions"][k] = base_policy(demos["obs"][k : k + 1])
        demos["next_base_actions"][k] = base_policy(demos["next_obs"][k : k + 1])
        if not done:
            demos["base_actions"][k + 1] = demos["next_base_actions"][k]
        step = {name: x[k : k + 1] for name, x in demos.items()}
        rb.add(**step | {"rewards": reward_scale * step["rewards"]})
        fresh = done
    return rb


def make_policy(checkpoint, sample=False, device="cpu"):
    """Rebuild the policy from a checkpoint alone, networks on `device`; raises UserError if its parts do not fit."""
    args, env = flags_of(Args, checkpoint), env_of(checkpoint)
    obs_dim = env.OBS_DIM + 6 * args.base_input
    actor = rebuild(lambda: Actor(obs_dim, 6, args.hidden_size, args.init_std), checkpoint["model"])
    policy = AgentPolicy(actor.to(device), sample)
    base_policy = make_base(args.base_policy, args, env, args.act_scale, checkpoint["base"], device)
    return ResidualPolicy(policy, base_policy, alpha_at(args, checkpoint["global_step"]), args.base_input)


if __name__ == "__main__":
    args = parse(Args)
    device = find_device(args.device)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)

    envs = gym.make_vec(
        "PaperSquare-v0",
        num_envs=args.num_envs,
        vectorization_mode="vector_entry_point",  # autoreset mode SAME_STEP
        **env_kwargs(args),
    )
    # The first episodes end early, each at another time: in step, every rollout would hold one phase of an episode only
    episode_steps = np.arange(args.num_envs) * envs.unwrapped.max_episode_steps // args.num_envs
    next_obs, _ = envs.reset(
        seed=np.random.SeedSequence(args.seed).spawn(args.num_envs),  # streams that no held-out episode has
        options={"episode_steps": episode_steps},
    )
    base_policy = make_base(args.base_policy, args, envs, args.act_scale, device=device)
    base_policy.reset(np.ones(args.num_envs, dtype=bool))
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
    if args.demos:
        demo_rb = demo_buffer(
            load_transitions(args.demos, type(envs.unwrapped), args.act_scale, args.observe_measured),
            make_base(args.base_policy, args, envs, args.act_scale, device=device),
            args.reward_scale,
        )
    num_demos = args.batch_size // 2 if args.demos else 0  # of each batch

    num_iterations = args.total_timesteps // args.num_envs
    run = Run(args, __file__, total=num_iterations * args.num_envs)
    episodes = Episodes(args.num_envs)
    global_step, gradient_steps, updates_due = 0, 0, 0.0
    last_log, seconds, losses = 0, np.zeros(2), {}  # seconds: of collecting and updating, since the last log

    def judge(how):
        parts = {"model": actor.state_dict(), "base": base_policy.checkpoint}
        checkpoint = run.checkpoint(envs, eval_kwargs(args), global_step, **parts)
        how(run, make_policy(checkpoint, device=device), checkpoint)

    run.begin(globals())  # after --resume, all of the above is what it was when the run was saved
    if global_step == 0:
        judge(validate)
    for iteration in range(global_step // args.num_envs + 1, num_iterations + 1):
        run.save(global_step)  # now and then, and if the run is to stop, which it does here

        # Schedules
        progress = (iteration - 1) / num_iterations
        if args.anneal_lr:
            for optimizer in (actor_optimizer, q_optimizer, temperature_optimizer):
                optimizer.param_groups[0]["lr"] = min(1.0, 2.0 - 2.0 * progress) * args.learning_rate
        if args.curriculum:
            share = max(0.0, 1.0 - 2.0 * progress)
            envs.unwrapped.tape_half_size = args.tape_half_size + share * (args.curriculum_start - args.tape_half_size)

        # Act
        step_start = time.perf_counter()
        global_step += args.num_envs
        obs = next_obs
        warmup = global_step <= args.learning_starts
        noise = torch.randn(args.num_envs, action_dim)
        if warmup:
            residual_action = (args.warmup_std * noise).clamp(-1.0, 1.0).numpy()
        else:
            with torch.inference_mode():
                x = torch.from_numpy(append_base(obs, base_action, args.base_input)).to(device)
                residual_action = actor.get_action(x, noise.to(device))[0].cpu().numpy()
            if global_step < args.prog_explore:
                residual_action *= (torch.rand(args.num_envs, 1) < global_step / args.prog_explore).numpy()
        alpha = alpha_at(args, global_step)
        action = np.clip(base_action + alpha * residual_action, -1.0, 1.0)

        next_obs, reward, terminations, truncations, infos = envs.step(action)
        done = terminations | truncations

        # The price of the residual
        penalty = args.residual_penalty * np.square(residual_action).sum(axis=1)
        reward = reward - penalty
        norm, base_norm = (np.linalg.norm(x, axis=1) for x in (residual_action, base_action))
        episodes.sum("residual", penalty=-penalty, norm=norm, base_norm=base_norm, alpha=np.full_like(norm, alpha))

        episodes.add(reward, terminations, truncations, infos)

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
        rb.add(**transition)
        base_action = next_base_action

        # Update
        update_start = time.perf_counter()
        updates_due += 0.0 if warmup else args.utd * args.num_envs
        while updates_due >= 1.0:
            updates_due -= 1.0
            gradient_steps += 1
            data = rb.sample(args.batch_size - num_demos, args.n_step, args.gamma)
            if num_demos:
                some = demo_rb.sample(num_demos, args.n_step, args.gamma)
                data = {name: torch.cat([x, some[name]]) for name, x in data.items()}
            data = {name: x.to(device) for name, x in data.items()}
            x, next_x = data["obs"], data["next_obs"]
            if args.base_input:
                x, next_x = torch.cat([x, data["base_actions"]], 1), torch.cat([next_x, data["next_base_actions"]], 1)
            temperature = log_temperature.exp().item()

            noise = torch.randn(args.batch_size, action_dim).to(device)
            with torch.no_grad():
                next_residual, next_logprob = actor.get_action(next_x, noise)
                next_action = (data["next_base_actions"] + alpha * next_residual).clamp(-1.0, 1.0)
                next_q = torch.min(qf1_target(next_x, next_action), qf2_target(next_x, next_action))
                next_q_value = data["returns"] + data["discounts"] * (next_q - temperature * next_logprob)
            qf1_loss = (qf1(x, data["actions"]) - next_q_value).square().mean()
            qf2_loss = (qf2(x, data["actions"]) - next_q_value).square().mean()
            q_optimizer.zero_grad()
            (qf1_loss + qf2_loss).backward()
            q_optimizer.step()
            losses |= {"losses/qf1_loss": qf1_loss.detach(), "losses/qf2_loss": qf2_loss.detach()}

            if gradient_steps % args.policy_frequency == 0:
                noise = torch.randn(args.batch_size, action_dim).to(device)
                residual, logprob = actor.get_action(x, noise)
                new_action = (data["base_actions"] + alpha * residual).clamp(-1.0, 1.0)
                min_q = torch.min(qf1(x, new_action), qf2(x, new_action))
                actor_loss = (temperature * logprob - min_q).mean()
                actor_optimizer.zero_grad()
                actor_loss.backward(inputs=actor_parameters)  # the critics' gradients would be for nothing
                actor_optimizer.step()
                if args.autotune:
                    temperature_loss = -(log_temperature.exp() * (logprob.detach() + target_entropy)).mean()
                    temperature_optimizer.zero_grad()
                    temperature_loss.backward()
                    temperature_optimizer.step()
                losses |= {"losses/qf_values": min_q.detach().mean(), "losses/policy_loss": actor_loss.detach()}
                losses |= {"losses/entropy": -logprob.detach().mean(), "losses/temperature": torch.tensor(temperature)}

            with torch.no_grad():
                for target, parameter in zip(q_target_parameters, q_parameters, strict=True):
                    target.lerp_(parameter, args.tau)
        now = time.perf_counter()
        seconds += update_start - step_start, now - update_start

        # Logging, of the last batch and of the steps since the last time
        num_steps = global_step - last_log
        if num_steps >= 1024 or iteration == num_iterations:
            with torch.no_grad():
                x = torch.from_numpy(append_base(next_obs, base_action, args.base_input)).to(device)
                std = actor(x)[1].exp().mean()
            scalars = {
                **episodes.scalars(),
                "charts/learning_rate": actor_optimizer.param_groups[0]["lr"],
                "charts/tape_half_size": envs.unwrapped.tape_half_size,
                "charts/std": std,
                "charts/SPS": num_steps / seconds.sum(),
                "time/collect": seconds[0],
                "time/update": seconds[1],
                **losses,
            }
            run.log(global_step, scalars, show="rollout/success_rate")
            last_log = global_step
            seconds[:] = 0.0
        if global_step >= args.eval_freq * len(run.evaluations) or iteration == num_iterations:
            judge(validate)
    run.end(global_step)
    judge(report)  # on test episodes, which nothing was chosen by
    envs.close()
