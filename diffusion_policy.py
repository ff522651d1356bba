"""Diffusion policy (arXiv 2303.04137) imitates demonstrations: it denoises noise into a chunk of joint targets.
A U-Net learns to see through the noise (DDPM); DDIM (arXiv 2010.02502) acts in few steps, from the same noise always.
In a minute on two cores, to 96 % of held-out episodes (3 seeds; from 25 demonstrations, 83 %):
    python record_demos.py --num-episodes 100 --output-dir demos
    python diffusion_policy.py --dataset demos
The policy is a base to be lifted: python ppo_residual.py --base-policy il --il-checkpoint runs/NAME/best.pt
"""

import copy
import functools
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.optim as optim
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange

from base_policies import FrozenILPolicy
from checkpoints import Stop, begin, fingerprint, fitting, make_run_dir, rebuild, restore, save_state
from env_paper_square import OBS, EnvArgs, eval_kwargs
from eval import check_rendering, report, validate
from flags import check_flags, fail, find_device, parse
from lerobot_dataset import load_demos

FREQUENCIES = torch.logspace(0.0, -2.0, 16)  # of the sines and cosines that tell the timestep, rad per step


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """first part of the run's name; everything it writes is under runs/NAME"""
    seed: int = 1
    """seed of the network and the batches"""
    torch_threads: int = 2
    """torch's threads; there is no physics while it trains"""
    num_threads: int = 0
    """threads that step the physics of the evaluations; 0 takes all cores"""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """where the networks are; auto takes cuda where there is one"""
    resume: str = ""
    """folder of a run, runs/NAME, that was stopped: go on with it, with its flags"""
    save_freq: int = 500
    """gradient steps between saves of the state for --resume; it is also saved when the run is stopped"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_project: str = "paper-square"
    """project to log to with --track"""
    capture_video: bool = False
    """film one held-out episode at the end"""
    log_freq: int = 100
    """gradient steps between rows of TensorBoard; the losses are means over them"""
    eval_freq: int = 1000
    """gradient steps between evaluations on held-out validation episodes"""
    eval_episodes: int = 100
    """episodes of each such evaluation"""
    test_episodes: int = 200
    """held-out test episodes of the table at the end"""

    # Demonstrations
    dataset: str = "demos"
    """folder of the demonstrations, a LeRobotDataset v3.0"""
    num_demos: int = 0
    """train on the first so many episodes of it; 0 takes all"""
    relative_actions: bool = True
    """predict joint targets relative to the measured joints, which are small; off: absolute ones, as LeRobot does"""

    # Imitation
    train_steps: int = 2000
    """gradient steps"""
    batch_size: int = 128
    """frames per gradient step, each with its chunk"""
    learning_rate: float = 1e-3
    """step size of AdamW"""
    anneal_lr: bool = True
    """anneal the step size linearly to zero"""
    weight_decay: float = 1e-4
    """weight decay of AdamW"""
    chunk_size: int = 16
    """joint targets that one observation predicts, k"""
    n_action_steps: int = 8
    """how many of them are played before the next prediction"""
    # Diffusion
    channels: int = 64
    """channels of the U-Net at the chunk's full length, twice as many at half of it; a multiple of 8"""
    embedding_size: int = 128
    """width of what its blocks are told of timestep and observation"""
    num_train_timesteps: int = 100
    """steps of the noising, K"""
    num_inference_steps: int = 4
    """steps of DDIM when it acts; its cost rises with them"""
    prediction_type: Literal["sample", "epsilon"] = "sample"
    """what the denoiser predicts: the chunk, or the noise as in the paper, which takes far longer to get precise"""
    ema_decay: float = 0.995
    """decay per gradient step of the averaged weights, which are the ones that act and are saved"""


def check_args(args):
    """Raise ValueError, one line for the user, for flags that do not fit each other."""
    if args.n_action_steps > args.chunk_size:
        raise ValueError(
            f"--n-action-steps must not exceed --chunk-size {args.chunk_size}, found {args.n_action_steps}"
        )
    if args.batch_size * args.chunk_size * args.channels > 2**25:  # some GB of activations
        raise ValueError(f"--batch-size times --chunk-size times --channels must not exceed {2**25:,}")
    if args.chunk_size % 2 or args.channels % 8:
        raise ValueError(
            f"--chunk-size must be even and --channels a multiple of 8, found {args.chunk_size} and {args.channels}"
        )
    if args.num_inference_steps > args.num_train_timesteps:
        raise ValueError(
            f"--num-inference-steps must lie in 1 to --num-train-timesteps {args.num_train_timesteps}, "
            f"found {args.num_inference_steps}"
        )
    if args.prediction_type not in ("sample", "epsilon"):
        raise ValueError(f"--prediction-type must be sample or epsilon, found {args.prediction_type!r}")


class Normalizer(nn.Module):
    """From LeRobot's units to zero mean, unit deviation over the demonstrations, and back; saved with the weights."""

    def __init__(self, relative_actions):
        super().__init__()
        self.relative_actions = relative_actions
        for name, size in (("state", 6), ("environment_state", 14), ("action", 6)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def fit(self, state, environment_state, chunks, mask):
        """Take the statistics of observations (N, 6), (N, 14) and of what the mask (N, chunk_size) leaves of chunks."""
        actions = (chunks - state[:, None] * self.relative_actions)[mask]
        for name, x in (("state", state), ("environment_state", environment_state), ("action", actions)):
            std = x.std(0, correction=0)
            # Weights of what never varied, as tape_half_size, are untrained: unscaled, it stays small if it does vary
            getattr(self, f"{name}_std").copy_(torch.where(std < 0.02, 1.0, std))
            getattr(self, f"{name}_mean").copy_(x.mean(0))

    def observation(self, state, environment_state):
        """Normalised (n, 6) and (n, 14); clamped, because a residual takes its base where no demonstration has been."""
        state = (state - self.state_mean) / self.state_std
        environment_state = (environment_state - self.environment_state_mean) / self.environment_state_std
        return state.clamp(-5.0, 5.0), environment_state.clamp(-5.0, 5.0)

    def normalize(self, chunks, state):
        """Chunks (n, chunk_size, 6) of absolute joint targets as the network predicts them, at the measured joints."""
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

    def __init__(self, args):
        super().__init__()
        self.chunk_size, self.n_action_steps = args.chunk_size, args.n_action_steps
        self.temporal_ensemble_coeff = 0.0
        self.num_inference_steps, self.sample = args.num_inference_steps, False
        self.predicts_noise = args.prediction_type == "epsilon"
        channels, embedding_size = args.channels, args.embedding_size
        self.normalizer = Normalizer(args.relative_actions)
        self.embed = nn.Sequential(
            nn.Linear(2 * len(FREQUENCIES) + 6 + 14, embedding_size),
            nn.SiLU(),
            nn.Linear(embedding_size, embedding_size),
            nn.SiLU(),
        )
        self.down = Block(6, channels, embedding_size)
        self.shorten = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.middle1 = Block(channels, 2 * channels, embedding_size)
        self.middle2 = Block(2 * channels, 2 * channels, embedding_size)
        self.lengthen = nn.ConvTranspose1d(2 * channels, channels, 4, stride=2, padding=1)
        self.up = Block(2 * channels, channels, embedding_size)
        self.head = nn.Conv1d(channels, 6, 1)

        # Acting starts from the same noise always, from a generator of its own: so a frozen policy is a function of the
        # observation, whatever else is in the batch and whatever was drawn before
        generator = torch.Generator().manual_seed(args.seed)
        noise = torch.randn((1, args.chunk_size, 6), generator=generator, device="cpu")
        self.register_buffer("noise", noise)
        self.register_buffer("low", torch.full((6,), -1.0))  # to high: range of the demonstrations' normalised actions
        self.register_buffer("high", torch.full((6,), 1.0))
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


def make_checkpoint(args, network, global_step):
    """Everything that `make_policy` and eval.py need, as torch.load(weights_only=True) accepts it."""
    return {
        "script": Path(__file__).stem,
        "args": asdict(args),
        "env_kwargs": eval_kwargs(EnvArgs()),
        "obs_names": list(OBS),
        "model": network.state_dict(),
        "global_step": global_step,
    }


def make_network(checkpoint):
    """Rebuild the network from a checkpoint alone; raises ValueError if its parts do not fit."""
    try:
        args = Args(**checkpoint["args"])
        check_flags(args)
        check_args(args)
        network = rebuild(lambda: Network(args), checkpoint["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint does not fit {Path(__file__).name}: {error}") from error
    return network.eval()


def make_policy(checkpoint, sample=False, device="cpu"):
    """The policy of a checkpoint alone, its `sample` starting from new noise each time; raises as `make_network`."""
    policy = FrozenILPolicy(checkpoint, checkpoint["env_kwargs"]["act_scale"], device)
    policy.network.sample = sample
    return policy


def make_chunks(action, episode, chunk_size):
    """For each frame the actions (N, chunk_size, 6) from it on, and which of them are real, (N, chunk_size) bool.

    action (N, 6); episode (N,), ascending. Past its episode's end a chunk repeats the last action.
    """
    t = torch.arange(len(episode))[:, None] + torch.arange(chunk_size)
    last = torch.searchsorted(episode, episode, right=True)[:, None] - 1  # (N, 1)
    return action[t.minimum(last)], t <= last


def masked_mean(errors, mask):
    """Mean of errors (n, chunk_size, 6) over what the mask (n, chunk_size) leaves of the chunks."""
    return errors[mask].mean()


def squared_cosine_schedule(num_train_timesteps):
    """alphas_cumprod (num_train_timesteps,), the share of the signal in the variance (arXiv 2102.09672, eq. 17)."""
    t = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2).square()
    betas = (1.0 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1.0 - betas).cumprod(0).float()


def add_noise(x, noise, alpha_cumprod):
    """Noisy chunks: what is left of x (n, chunk_size, 6) at alpha_cumprod (n, 1, 1), and the noise."""
    return alpha_cumprod.sqrt() * x + (1.0 - alpha_cumprod).sqrt() * noise


def ddim(denoise, x, alphas_cumprod, num_inference_steps):
    """Chunks from noise x (n, chunk_size, 6) by DDIM with eta = 0; denoise(x, t) estimates the noise-free ones."""
    stride = len(alphas_cumprod) // num_inference_steps
    # Begins a stride below the last timestep, which holds too little signal to divide by
    for t in range((num_inference_steps - 1) * stride, -1, -stride):
        alpha, next_alpha = alphas_cumprod[t], alphas_cumprod[t - stride] if t else torch.ones(())
        estimate = denoise(x, t)
        noise = (x - alpha.sqrt() * estimate) / (1.0 - alpha).sqrt()  # what x holds if the estimate is right
        x = add_noise(estimate, noise, next_alpha)
    return x


if __name__ == "__main__":
    args, run_dir, state = begin(parse(Args), Path(__file__).stem)
    try:
        check_args(args)
        device = find_device(args.device)
        demos = {key: torch.tensor(rows) for key, rows in load_demos(args.dataset, args.num_demos).items()}
        if args.capture_video:
            check_rendering()
        if args.track:
            import wandb
        if state is None:
            make_run_dir(run_dir, Path(__file__).stem, asdict(args))
    except ImportError:
        fail("--track needs Weights & Biases: pip install wandb")
    except (ValueError, RuntimeError, OSError) as error:
        fail(str(error))
    if args.track:
        names = {"id": run_dir.name, "name": run_dir.name, "resume": "allow"}  # after --resume, the same run
        wandb.init(project=args.wandb_project, config=asdict(args), sync_tensorboard=True, **names)
    writer = SummaryWriter(run_dir, purge_step=state["global_step"] + 1 if state else 0)
    if not state:
        writer.add_text("args", "\n".join(["|flag|value|", "|-|-|", *(f"|{k}|{v}|" for k, v in asdict(args).items())]))

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)

    # The whole dataset in memory, as the network sees it
    network = Network(args)
    normalizer = network.normalizer
    chunks, mask = make_chunks(demos["action"], demos["episode"], args.chunk_size)
    normalizer.fit(demos["state"], demos["environment_state"], chunks, mask)
    states, environment_states = normalizer.observation(demos["state"], demos["environment_state"])
    chunks = normalizer.normalize(chunks, demos["state"])
    states, environment_states, chunks, mask = (x.to(device) for x in (states, environment_states, chunks, mask))
    network.low.copy_(chunks[mask].amin(0))
    network.high.copy_(chunks[mask].amax(0))
    network.to(device)
    ema = copy.deepcopy(network)
    optimizer = optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)

    # Evaluation on validation episodes, before the first update and every eval_freq steps
    evaluations = []

    def evaluate(global_step):
        checkpoint = make_checkpoint(args, ema, global_step)
        policy, elapsed = make_policy(checkpoint, device=device), time.perf_counter() - start_time
        row = validate(policy, checkpoint, args.eval_episodes, elapsed, evaluations, run_dir)
        for key, value in row.items():
            writer.add_scalar(f"eval/{key}", value, global_step)
        writer.add_scalar("time/eval", evaluations[-1]["eval_seconds"], global_step)

    start_time = update_start = time.perf_counter()
    global_step, losses = 0, []

    # The state that --resume goes on from
    parts = {"network": network, "ema": ema, "optimizer": optimizer}

    def make_state():
        return {
            "script": Path(__file__).stem,
            "args": asdict(args),
            "global_step": global_step,
            "seconds": time.perf_counter() - start_time,
            "evaluations": evaluations,
            "rng": torch.get_rng_state(),
            **{name: part.state_dict() for name, part in parts.items()},
            "demos": fingerprint(demos),
            "log": [torch.tensor(losses), time.perf_counter() - update_start],
        }

    if state:
        with fitting(run_dir):
            if fingerprint(demos) != state["demos"]:
                raise ValueError(f"the demonstrations in {args.dataset} are not those that it began with")
            restore(parts, state, make_state())
            torch.set_rng_state(state["rng"])
            global_step, evaluations = state["global_step"], state["evaluations"]
            start_time -= state["seconds"]
            losses, seconds = state["log"][0].tolist(), state["log"][1]
            update_start -= seconds
    else:
        evaluate(0)
        update_start = time.perf_counter()
    stop = Stop()
    bar = trange(global_step + 1, args.train_steps + 1, initial=global_step, total=args.train_steps, unit="step")

    for global_step in bar:
        # Schedule
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1.0 - (global_step - 1) / args.train_steps) * args.learning_rate

        # Update
        b_inds = torch.randint(len(chunks), (args.batch_size,))
        b_states, b_environment_states = states[b_inds], environment_states[b_inds]
        b_chunks, b_mask = chunks[b_inds], mask[b_inds]
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
        if global_step % args.log_freq == 0:
            seconds = time.perf_counter() - update_start
            denoising_loss = sum(losses) / len(losses)
            scalars = {
                "charts/learning_rate": optimizer.param_groups[0]["lr"],
                "charts/SPS": len(losses) / seconds,
                "losses/denoising_loss": denoising_loss,
                "time/update": seconds,
            }
            for key, scalar in scalars.items():
                writer.add_scalar(key, scalar, global_step)
            bar.set_postfix(loss=f"{denoising_loss:.3f}", eval=f"{evaluations[-1]['success_rate']:.2f}")
            losses, update_start = [], time.perf_counter()

        if global_step % args.eval_freq == 0 or global_step == args.train_steps:
            eval_start = time.perf_counter()
            evaluate(global_step)
            update_start += time.perf_counter() - eval_start

        # Save the state now and then, and if asked to stop
        if stop.number or global_step % args.save_freq == 0:
            writer.flush()
            save_state(make_state(), run_dir)
        if stop.number:
            bar.close()
            stop.exit(run_dir)

    # The result, on test episodes, which nothing was chosen by
    checkpoint = make_checkpoint(args, ema, global_step)
    policy = make_policy(checkpoint, device=device)
    results = report(policy, checkpoint, args.test_episodes, evaluations, run_dir, film=args.capture_video)
    writer.close()
