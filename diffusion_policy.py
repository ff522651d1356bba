"""Diffusion policy (arXiv 2303.04137) imitates demonstrations: it denoises noise into a chunk of joint targets.
A U-Net learns to see through the noise (DDPM); DDIM (arXiv 2010.02502) acts in few steps, from the same noise always.
In a minute on two cores, from 25 demonstrations to 95 % of held-out episodes (one seed):
    python record_demos.py --num-episodes 100 --output-dir demos
    python diffusion_policy.py --dataset demos --num-demos 25
The policy is a base to be lifted: python ppo_residual.py --base-policy il --il-checkpoint runs/NAME/best.safetensors
"""

import copy
import functools
import os
import time
from dataclasses import dataclass
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch loads: threads that wait leave busy cores to others

import torch
import torch.nn as nn
import torch.optim as optim

from base_policies import FrozenILPolicy
from eval import report, validate
from lerobot_dataset import Frames, load_demos, load_task
from runs import Real, Run, RunArgs, Whole, env_of, find_device, flags_of, parse, rebuild

FREQUENCIES = torch.logspace(0.0, -2.0, 16)  # of the sines and cosines that tell the timestep, rad per step


@dataclass
class Args(RunArgs):
    torch_threads: Whole[1, 256] = 2
    """torch's threads; there is no physics while it trains"""
    num_threads: Whole[0, 1024] = 0
    """threads that step the physics of the evaluations; 0 takes all cores"""
    save_freq: Whole[1, 10**10] = 500
    """gradient steps between saves of the state for --resume; it is also saved when the run is stopped"""
    log_freq: Whole[1, 10**7] = 100
    """gradient steps between rows of TensorBoard; the losses are means over them"""
    eval_freq: Whole[1, 10**10] = 1000
    """gradient steps between evaluations on held-out validation episodes"""

    # Demonstrations
    dataset: str = "demos"
    """folder of the demonstrations, a LeRobotDataset v3.0"""
    num_demos: Whole[0, 10**6] = 0
    """train on the first so many episodes of it; 0 takes all"""
    joints: Literal["commanded", "measured"] = "commanded"
    """joints that the network sees: where they were sent, or where the servos say they are"""
    relative_actions: bool = True
    """predict joint targets relative to the joints, which are small; off: absolute ones, as LeRobot does"""

    # Imitation
    train_steps: Whole[1, 10**8] = 2000
    """gradient steps"""
    batch_size: Whole[1, 65_536] = 128
    """frames per gradient step, each with its chunk"""
    learning_rate: Real[1e-12, 1] = 1e-3
    """step size of AdamW"""
    anneal_lr: bool = True
    """anneal the step size linearly to zero"""
    weight_decay: Real[0, 1] = 1e-4
    """weight decay of AdamW"""
    chunk_size: Whole[1, 400] = 16
    """joint targets that one observation predicts, k"""
    n_action_steps: Whole[1, 400] = 8
    """how many of them are played before the next prediction"""
    # Diffusion
    channels: Whole[8, 512] = 64
    """channels of the U-Net at the chunk's full length, twice as many at half of it; a multiple of 8"""
    embedding_size: Whole[1, 4096] = 128
    """width of what its blocks are told of timestep and observation"""
    num_train_timesteps: Whole[1, 1000] = 100
    """steps of the noising, K"""
    num_inference_steps: Whole[1, 1000] = 4
    """steps of DDIM when it acts; its cost rises with them"""
    prediction_type: Literal["sample", "epsilon"] = "sample"
    """what the denoiser predicts: the chunk, or the noise as in the paper, which takes far longer to get precise"""
    ema_decay: Real[0, 0.999999] = 0.995
    """decay per gradient step of the averaged weights, which are the ones that act and are saved"""

    def __post_init__(self):
        super().__post_init__()
        if self.n_action_steps > self.chunk_size:
            raise ValueError(f"--n-action-steps must not exceed --chunk-size {self.chunk_size}")
        if self.batch_size * self.chunk_size * self.channels > 2**25:  # some GB of activations
            raise ValueError(f"--batch-size times --chunk-size times --channels must not exceed {2**25:,}")
        if self.chunk_size % 2 or self.channels % 8:
            raise ValueError("--chunk-size must be even and --channels a multiple of 8")
        if self.num_inference_steps > self.num_train_timesteps:
            raise ValueError(f"--num-inference-steps must not exceed --num-train-timesteps {self.num_train_timesteps}")


class Normalizer(nn.Module):
    """From LeRobot's units to zero mean, unit deviation over the demonstrations, and back; saved with the weights."""

    def __init__(self, relative_actions, sizes):
        super().__init__()
        self.relative_actions = relative_actions
        for name, size in sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def fit(self, state, environment_state, chunks, mask):
        """Take the statistics of observations (N, 6), (N, 15) and of what the mask (N, chunk_size) leaves of chunks."""
        actions = (chunks - state[:, None] * self.relative_actions)[mask]
        for name, x in (("state", state), ("environment_state", environment_state), ("action", actions)):
            std = x.std(0, correction=0)
            # Weights of what never varied, as tape_half_size, are untrained: unscaled, it stays small if it does vary
            getattr(self, f"{name}_std").copy_(torch.where(std < 0.02, 1.0, std))
            getattr(self, f"{name}_mean").copy_(x.mean(0))

    def observation(self, state, environment_state):
        """Normalised (n, 6) and (n, 15); clamped, because a residual takes its base where no demonstration has been."""
        state = (state - self.state_mean) / self.state_std
        environment_state = (environment_state - self.environment_state_mean) / self.environment_state_std
        return state.clamp(-5.0, 5.0), environment_state.clamp(-5.0, 5.0)

    def normalize(self, chunks, state):
        """Chunks (n, chunk_size, 6) of absolute joint targets as the network predicts them, at the joints."""
        return (chunks - state[:, None] * self.relative_actions - self.action_mean) / self.action_std

    def unnormalize(self, chunks, state):
        """The inverse of `normalize`."""
        return chunks * self.action_std + self.action_mean + state[:, None] * self.relative_actions


class Block(nn.Module):
    """Two convolutions over time, the first told of timestep and observation by FiLM (arXiv 1709.07871)."""

    def __init__(self, in_channels, out_channels, embedding_size):
        super().__init__()
        self.conv1 = nn.Conv1d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, out_channels), nn.GroupNorm(8, out_channels)
        self.film = nn.Linear(embedding_size, 2 * out_channels)
        self.skip = nn.Conv1d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, embedding):
        scale, shift = self.film(embedding)[:, :, None].chunk(2, dim=1)
        hidden = (1.0 + scale) * nn.functional.silu(self.norm1(self.conv1(x))) + shift
        return self.skip(x) + nn.functional.silu(self.norm2(self.conv2(hidden)))


class Network(nn.Module):
    """The denoiser: a 1-D U-Net over the chunk, down to half its length and back."""

    def __init__(self, args, sizes):
        super().__init__()
        self.chunk_size, self.n_action_steps = args.chunk_size, args.n_action_steps
        self.temporal_ensemble_coeff = 0.0
        self.num_inference_steps, self.sample = args.num_inference_steps, False
        self.predicts_noise = args.prediction_type == "epsilon"
        channels, embedding_size = args.channels, args.embedding_size
        self.normalizer = Normalizer(args.relative_actions, sizes)
        self.embed = nn.Sequential(
            nn.Linear(2 * len(FREQUENCIES) + sizes["state"] + sizes["environment_state"], embedding_size),
            nn.SiLU(),
            nn.Linear(embedding_size, embedding_size),
            nn.SiLU(),
        )
        self.down = Block(sizes["action"], channels, embedding_size)
        self.shorten = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.middle1 = Block(channels, 2 * channels, embedding_size)
        self.middle2 = Block(2 * channels, 2 * channels, embedding_size)
        self.lengthen = nn.ConvTranspose1d(2 * channels, channels, 4, stride=2, padding=1)
        self.up = Block(2 * channels, channels, embedding_size)
        self.head = nn.Conv1d(channels, sizes["action"], 1)

        # Acting starts from the same noise always, from a generator of its own: so a frozen policy is a function of the
        # observation, whatever else is in the batch and whatever was drawn before
        generator = torch.Generator().manual_seed(args.seed)
        size = sizes["action"]
        self.register_buffer("noise", torch.randn((1, args.chunk_size, size), generator=generator))
        self.register_buffer("low", torch.full((size,), -1.0))  # to high: range of the demonstrated actions
        self.register_buffer("high", torch.full((size,), 1.0))
        self.register_buffer("alphas_cumprod", squared_cosine_schedule(args.num_train_timesteps), persistent=False)

    def forward(self, x, timesteps, state, environment_state):
        """The noise-free chunks, or the noise, (n, chunk_size, 6) in chunks x at timesteps (n,), all normalised."""
        angles = timesteps[:, None] * FREQUENCIES.to(x.device)
        embedding = self.embed(torch.cat([angles.sin(), angles.cos(), state, environment_state], dim=1))
        down = self.down(x.transpose(1, 2), embedding)  # (n, channels, chunk_size)
        middle = self.middle2(self.middle1(self.shorten(down), embedding), embedding)
        up = self.up(torch.cat([down, self.lengthen(middle)], dim=1), embedding)
        return self.head(up).transpose(1, 2)

    def denoise(self, x, t, state, environment_state):
        """An estimate of the noise-free chunks from x (n, chunk_size, 6) at timestep t, within their range."""
        alpha = self.alphas_cumprod[t]
        estimate = self(x, torch.full((len(x),), t, device=x.device), state, environment_state)
        if self.predicts_noise:
            estimate = (x - (1.0 - alpha).sqrt() * estimate) / alpha.sqrt()
        return estimate.clamp(self.low, self.high)

    def predict(self, state, environment_state):
        """Chunks (n, chunk_size, 6) of absolute joint targets, in LeRobot's units as the observation is."""
        observation = self.normalizer.observation(state, environment_state)
        shape = len(state), *self.noise.shape[1:]
        noise = torch.randn(shape).to(state.device) if self.sample else self.noise.expand(shape)
        denoise = functools.partial(self.denoise, state=observation[0], environment_state=observation[1])
        chunks = ddim(denoise, noise, self.alphas_cumprod, self.num_inference_steps)
        return self.normalizer.unnormalize(chunks, state)


def make_network(checkpoint):
    """Rebuild the network from a checkpoint alone; raises UserError if its parts do not fit."""
    args, sizes = flags_of(Args, checkpoint), checkpoint["sizes"]
    return rebuild(lambda: Network(args, sizes), checkpoint["model"]).eval()


def make_policy(checkpoint, sample=False, device="cpu"):
    """The policy of a checkpoint alone, its `sample` starting from new noise each time; raises as `make_network`."""
    policy = FrozenILPolicy(checkpoint, env_of(checkpoint), checkpoint["env"]["kwargs"]["act_scale"], device)
    policy.network.sample = sample
    return policy


def make_chunks(action, episode, chunk_size):
    """For each frame the actions (N, chunk_size, 6) from it on, and which of them are real, (N, chunk_size) bool.

    action (N, 6); episode (N,), ascending. Past its episode's end a chunk repeats the last action.
    """
    t = torch.arange(len(episode))[:, None] + torch.arange(chunk_size)
    last = torch.searchsorted(episode, episode, right=True)[:, None] - 1  # (N, 1)
    return action[t.minimum(last)], t <= last


def make_frames(demos, network, chunk_size):
    """The demonstrations in memory as the network sees them, whose statistics it takes of them."""
    chunks, mask = make_chunks(demos["action"], demos["episode"], chunk_size)
    network.normalizer.fit(demos["state"], demos["environment_state"], chunks, mask)
    observations = network.normalizer.observation(demos["state"], demos["environment_state"])
    chunks = network.normalizer.normalize(chunks, demos["state"])
    network.low.copy_(chunks[mask].amin(0))
    network.high.copy_(chunks[mask].amax(0))
    return Frames(*observations, chunks, mask)


def masked_mean(errors, mask):
    """Mean of errors (n, chunk_size, 6) over what the mask (n, chunk_size) leaves of the chunks."""
    return errors[mask].mean()


def squared_cosine_schedule(num_train_timesteps):
    """alphas_cumprod (num_train_timesteps,), the share of the signal in the variance (arXiv 2102.09672, eq. 17)."""
    t = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2).square()
    betas = (1.0 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1.0 - betas).cumprod(0).float()


def add_noise(x, noise, alpha_cumprod):
    """Noisy chunks: what is left of x (n, chunk_size, 6) at alpha_cumprod (n, 1, 1), and the noise."""
    return alpha_cumprod.sqrt() * x + (1.0 - alpha_cumprod).sqrt() * noise


def ddim(denoise, x, alphas_cumprod, num_inference_steps):
    """Chunks from noise x (n, chunk_size, 6) by DDIM with eta = 0; denoise(x, t) estimates the noise-free ones."""
    last = len(alphas_cumprod) - 1
    # Several steps begin a stride below the last timestep, which holds too little signal to divide by
    timesteps = [k * (last + 1) // num_inference_steps for k in range(num_inference_steps)][::-1]
    timesteps = timesteps if num_inference_steps > 1 else [last]  # one step from timestep 0 would take noise for signal
    for t, next_t in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha, next_alpha = alphas_cumprod[t], torch.ones(()) if next_t is None else alphas_cumprod[next_t]
        estimate = denoise(x, t)
        noise = (x - alpha.sqrt() * estimate) / (1.0 - alpha).sqrt()  # what x holds if the estimate is right
        x = add_noise(estimate, noise, next_alpha)
    return x


if __name__ == "__main__":
    args = parse(Args)
    device = find_device(args.device)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)

    env, env_kwargs = load_task(args.dataset)  # it is judged by the task that was demonstrated
    env_kwargs["observe_measured"] = args.joints == "measured"
    demos = {
        key: torch.tensor(rows) for key, rows in load_demos(args.dataset, args.num_demos, env, args.joints).items()
    }
    sizes = {key: demos[key].shape[1] for key in ("state", "environment_state", "action")}
    network = Network(args, sizes)
    frames = make_frames(demos, network, args.chunk_size)
    del demos  # all that the training needs are the frames
    network.to(device)
    frames.to(device)
    ema = copy.deepcopy(network)
    optimizer = optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)

    run = Run(args, __file__, total=args.train_steps)
    global_step, losses, seconds = 0, [], 0.0  # of the steps since the last log

    def judge(how):
        parts = {"model": ema.state_dict(), "sizes": sizes}
        checkpoint = run.checkpoint(env, env_kwargs, global_step, **parts)
        how(run, make_policy(checkpoint, device=device), checkpoint)

    run.begin(globals())  # after --resume, all of the above is what it was when the run was saved
    if global_step == 0:
        judge(validate)
    while global_step < args.train_steps:
        run.save(global_step)  # now and then, and if the run is to stop, which it does here
        global_step, step_start = global_step + 1, time.perf_counter()

        # Schedule
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1.0 - (global_step - 1) / args.train_steps) * args.learning_rate

        # Update
        b_inds = torch.randint(len(frames), (args.batch_size,))
        b_states, b_environment_states, b_chunks, b_mask = frames[b_inds]
        timesteps = torch.randint(args.num_train_timesteps, (args.batch_size,)).to(device)
        noise = torch.randn(b_chunks.shape).to(device)
        x = add_noise(b_chunks, noise, network.alphas_cumprod[timesteps, None, None])
        target = noise if network.predicts_noise else b_chunks
        loss = masked_mean((network(x, timesteps, b_states, b_environment_states) - target).square(), b_mask)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(args.ema_decay, global_step / (10 + global_step))  # soon forgets the start
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), network.parameters(), strict=True):
                average.lerp_(parameter, 1.0 - decay)

        # Logging
        losses.append(loss.item())
        seconds += time.perf_counter() - step_start
        if global_step % args.log_freq == 0:
            scalars = {
                "charts/learning_rate": optimizer.param_groups[0]["lr"],
                "charts/SPS": len(losses) / seconds,
                "losses/denoising_loss": sum(losses) / len(losses),
                "time/update": seconds,
            }
            run.log(global_step, scalars, show="losses/denoising_loss")
            losses, seconds = [], 0.0
        if global_step % args.eval_freq == 0 or global_step == args.train_steps:
            judge(validate)
    run.end(global_step)
    judge(report)  # on test episodes, which nothing was chosen by
