"""ACT (arXiv 2304.13705) imitates demonstrations: a transformer predicts a chunk of joint targets from one observation.
A CVAE takes in what varies between demonstrations of the same situation, z, which is zero when it acts.
In 100 seconds on two cores, to 81 % of held-out episodes (3 seeds; from 25 demonstrations, 74 %):
    python record_demos.py --num-episodes 100 --output-dir demos
    python act.py --dataset demos
The policy is a base to be lifted: python ppo_residual.py --base-policy il --il-checkpoint runs/NAME/best.pt
"""

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
    dim_model: int = 64
    """width of the transformers"""
    n_heads: int = 4
    """attention heads; must divide dim_model"""
    dim_feedforward: int = 128
    """width of their feed-forward layers"""
    n_decoder_layers: int = 1
    """layers that turn queries into actions, attending to the observation"""
    dropout: float = 0.1
    """dropout of the transformers"""

    # ACT
    n_encoder_layers: int = 2
    """layers that encode the observation and z"""
    n_vae_layers: int = 2
    """layers of the CVAE's encoder, which acting does without"""
    latent_dim: int = 8
    """size of z"""
    kl_weight: float = 10.0
    """weight of the KL divergence of z from its prior, beta"""
    temporal_ensemble_coeff: float = 0.0
    """m: average all chunks' predictions for a step, weighted by exp(-m i), the oldest being i = 0; 0 plays chunks"""


def check_args(args):
    """Raise ValueError, one line for the user, for flags that do not fit each other."""
    if args.n_action_steps > args.chunk_size:
        raise ValueError(
            f"--n-action-steps must not exceed --chunk-size {args.chunk_size}, found {args.n_action_steps}"
        )
    if args.batch_size * args.chunk_size * args.dim_model > 2**25:  # some GB of activations
        raise ValueError(f"--batch-size times --chunk-size times --dim-model must not exceed {2**25:,}")
    if args.dim_model % args.n_heads:
        raise ValueError(f"--n-heads must divide --dim-model {args.dim_model}, found {args.n_heads}")


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


class Network(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.chunk_size, self.n_action_steps = args.chunk_size, args.n_action_steps
        self.temporal_ensemble_coeff = args.temporal_ensemble_coeff
        self.latent_dim, self.sample = args.latent_dim, False
        dim, sizes = args.dim_model, (args.dim_model, args.n_heads, args.dim_feedforward, args.dropout)
        options = {"batch_first": True, "norm_first": True}  # normalised first, it needs no warm-up
        encoder_layer = nn.TransformerEncoderLayer(*sizes, **options)
        decoder_layer = nn.TransformerDecoderLayer(*sizes, **options)
        self.normalizer = Normalizer(args.relative_actions)

        # CVAE encoder, over [CLS], state and chunk
        self.vae_state_proj, self.vae_action_proj = nn.Linear(6, dim), nn.Linear(6, dim)
        self.vae_cls = nn.Parameter(0.02 * torch.randn(1, 1, dim, device="cpu"))
        self.vae_position = nn.Parameter(0.02 * torch.randn(1, 2 + args.chunk_size, dim, device="cpu"))
        self.vae_encoder = nn.TransformerEncoder(encoder_layer, args.n_vae_layers, nn.LayerNorm(dim), False)
        self.vae_head = nn.Linear(dim, 2 * args.latent_dim)

        # Policy: an encoder over z, state and environment_state, and a decoder with a learned query per action
        self.state_proj, self.environment_state_proj = nn.Linear(6, dim), nn.Linear(14, dim)
        self.latent_proj = nn.Linear(args.latent_dim, dim)
        self.token = nn.Parameter(0.02 * torch.randn(1, 3, dim, device="cpu"))  # added, it says which token is which
        self.encoder = nn.TransformerEncoder(encoder_layer, args.n_encoder_layers, nn.LayerNorm(dim), False)
        self.query = nn.Parameter(0.02 * torch.randn(1, args.chunk_size, dim, device="cpu"))
        self.decoder = nn.TransformerDecoder(decoder_layer, args.n_decoder_layers, nn.LayerNorm(dim))
        self.action_head = nn.Linear(dim, 6)
        for transformer in (self.vae_encoder, self.encoder, self.decoder):  # whose layers torch made as equal copies
            for parameter in transformer.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def encode(self, state, chunks, mask):
        """Mean and log variance of z, (n, latent_dim) each, from all that is normalised."""
        tokens = [self.vae_cls.expand(len(state), 1, -1), self.vae_state_proj(state)[:, None]]
        tokens = torch.cat([*tokens, self.vae_action_proj(chunks)], dim=1) + self.vae_position
        padding = nn.functional.pad(~mask, (2, 0))  # (n, 2 + chunk_size), [CLS] and state are never padding
        x = self.vae_encoder(tokens, src_key_padding_mask=padding)
        return self.vae_head(x[:, 0]).chunk(2, dim=1)

    def forward(self, z, state, environment_state):
        """Chunks (n, chunk_size, 6) from z (n, latent_dim) and the observation, all normalised."""
        tokens = [self.latent_proj(z), self.state_proj(state), self.environment_state_proj(environment_state)]
        memory = self.encoder(torch.stack(tokens, dim=1) + self.token)  # (n, 3, dim)
        return self.action_head(self.decoder(self.query.expand(len(z), -1, -1), memory))

    def predict(self, state, environment_state):
        """Chunks (n, chunk_size, 6) of absolute joint targets, in LeRobot's units as the observation is."""
        shape = len(state), self.latent_dim
        z = (torch.randn(shape) if self.sample else torch.zeros(shape)).to(state.device)
        chunks = self(z, *self.normalizer.observation(state, environment_state))
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
    """The policy of a checkpoint alone, its `sample` drawing z from the prior; raises as `make_network`."""
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


def kl_divergence(mean, logvar):
    """KL divergence of N(mean, exp(logvar)) (n, latent_dim) from N(0, 1): the sum over z, the mean over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(1).mean()


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
    network.to(device)
    optimizer = optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)

    # Evaluation on validation episodes, before the first update and every eval_freq steps
    evaluations = []

    def evaluate(global_step):
        checkpoint = make_checkpoint(args, network, global_step)
        policy, elapsed = make_policy(checkpoint, device=device), time.perf_counter() - start_time
        row = validate(policy, checkpoint, args.eval_episodes, elapsed, evaluations, run_dir)
        for key, value in row.items():
            writer.add_scalar(f"eval/{key}", value, global_step)
        writer.add_scalar("time/eval", evaluations[-1]["eval_seconds"], global_step)

    start_time = update_start = time.perf_counter()
    global_step, losses = 0, []

    # The state that --resume goes on from
    parts = {"network": network, "optimizer": optimizer}

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
            "log": [torch.tensor(losses).reshape(len(losses), 2), time.perf_counter() - update_start],
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
        mean, logvar = network.encode(b_states, b_chunks, b_mask)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape).to(device)
        l1_loss = masked_mean((network(z, b_states, b_environment_states) - b_chunks).abs(), b_mask)
        kl_loss = kl_divergence(mean, logvar)
        loss = l1_loss + args.kl_weight * kl_loss

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # Logging
        losses.append([l1_loss.item(), kl_loss.item()])
        if global_step % args.log_freq == 0:
            seconds = time.perf_counter() - update_start
            l1_mean, kl_mean = torch.tensor(losses).mean(0).tolist()
            scalars = {
                "charts/learning_rate": optimizer.param_groups[0]["lr"],
                "charts/SPS": len(losses) / seconds,
                "losses/l1_loss": l1_mean,
                "losses/kl_loss": kl_mean,
                "time/update": seconds,
            }
            for key, scalar in scalars.items():
                writer.add_scalar(key, scalar, global_step)
            bar.set_postfix(loss=f"{l1_mean:.3f}", eval=f"{evaluations[-1]['success_rate']:.2f}")
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
    checkpoint = make_checkpoint(args, network, global_step)
    policy = make_policy(checkpoint, device=device)
    results = report(policy, checkpoint, args.test_episodes, evaluations, run_dir, film=args.capture_video)
    writer.close()
