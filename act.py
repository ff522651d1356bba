"""ACT (arXiv 2304.13705) imitates demonstrations: a transformer predicts a chunk of joint targets from one observation.
A CVAE takes in what varies between demonstrations of the same situation, z, which is zero when it acts.
In 100 seconds on two cores, from 25 demonstrations to 93 % of held-out episodes (one seed):
    python record_demos.py --num-episodes 100 --output-dir demos
    python act.py --dataset demos --num-demos 25
The policy is a base to be lifted: python ppo_residual.py --base-policy il --il-checkpoint runs/NAME/best.safetensors
"""

import os
import time
from dataclasses import dataclass
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch loads: threads that wait leave busy cores to others

import torch
import torch.nn as nn
import torch.optim as optim

from base_policies import FrozenILPolicy
from env_paper_square import CAMERAS
from eval import report, validate
from lerobot_dataset import Frames, load_demos, load_task
from runs import Real, Run, RunArgs, Whole, env_of, find_device, flags_of, parse, rebuild


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
    pixels: tuple[Literal[CAMERAS], ...] = ()
    """cameras to see, of a dataset with videos, in place of what is known of the sheet"""
    pixel_size: Whole[36, 512] = 64
    """height and width of their frames, pixels"""
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
    dim_model: Whole[1, 1024] = 64
    """width of the transformers"""
    n_heads: Whole[1, 1024] = 4
    """attention heads; must divide dim_model"""
    dim_feedforward: Whole[1, 4096] = 128
    """width of their feed-forward layers"""
    n_decoder_layers: Whole[1, 12] = 1
    """layers that turn queries into actions, attending to the observation"""
    dropout: Real[0, 0.99] = 0.1
    """dropout of the transformers"""

    # ACT
    n_encoder_layers: Whole[1, 12] = 2
    """layers that encode the observation and z"""
    n_vae_layers: Whole[1, 12] = 2
    """layers of the CVAE's encoder, which acting does without"""
    latent_dim: Whole[1, 1024] = 8
    """size of z"""
    kl_weight: Real[0, 1e6] = 10.0
    """weight of the KL divergence of z from its prior, beta"""
    temporal_ensemble_coeff: Real[0, 1e3] = 0.0
    """m: average all chunks' predictions for a step, weighted by exp(-m i), the oldest being i = 0; 0 plays chunks"""

    def __post_init__(self):
        super().__post_init__()
        if self.n_action_steps > self.chunk_size:
            raise ValueError(f"--n-action-steps must not exceed --chunk-size {self.chunk_size}")
        if self.batch_size * self.chunk_size * self.dim_model > 2**25:  # some GB of activations
            raise ValueError(f"--batch-size times --chunk-size times --dim-model must not exceed {2**25:,}")
        if self.dim_model % self.n_heads:
            raise ValueError(f"--n-heads must divide --dim-model {self.dim_model}")


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


class Network(nn.Module):
    def __init__(self, args, sizes):
        super().__init__()
        self.chunk_size, self.n_action_steps = args.chunk_size, args.n_action_steps
        self.temporal_ensemble_coeff = args.temporal_ensemble_coeff
        self.latent_dim, self.sample = args.latent_dim, False
        dim, layer = args.dim_model, (args.dim_model, args.n_heads, args.dim_feedforward, args.dropout)
        options = {"batch_first": True, "norm_first": True}  # normalised first, it needs no warm-up
        encoder_layer = nn.TransformerEncoderLayer(*layer, **options)
        decoder_layer = nn.TransformerDecoderLayer(*layer, **options)
        self.normalizer = Normalizer(args.relative_actions, sizes)

        # CVAE encoder, over [CLS], state and chunk
        self.vae_state_proj, self.vae_action_proj = nn.Linear(sizes["state"], dim), nn.Linear(sizes["action"], dim)
        self.vae_cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.vae_position = nn.Parameter(0.02 * torch.randn(1, 2 + args.chunk_size, dim))
        self.vae_encoder = nn.TransformerEncoder(encoder_layer, args.n_vae_layers, nn.LayerNorm(dim), False)
        self.vae_head = nn.Linear(dim, 2 * args.latent_dim)

        # Policy: an encoder over z, state, environment_state or frames, and a decoder with a learned query per action
        self.cameras = args.pixels
        self.state_proj = nn.Linear(sizes["state"], dim)
        if self.cameras:
            self.frames_proj = nn.Sequential(  # of all cameras together, to a token per place in the image
                nn.Conv2d(3 * len(self.cameras), 32, 8, stride=4),
                nn.ReLU(),
                nn.Conv2d(32, 64, 4, stride=2),
                nn.ReLU(),
                nn.Conv2d(64, dim, 3),
                nn.Flatten(2),
            )
            num_tokens = 2 + (((args.pixel_size - 8) // 4 - 3) // 2 - 1) ** 2
        else:
            self.environment_state_proj, num_tokens = nn.Linear(sizes["environment_state"], dim), 3
        self.latent_proj = nn.Linear(args.latent_dim, dim)
        self.token = nn.Parameter(0.02 * torch.randn(1, num_tokens, dim))  # added, it says which token is which
        self.encoder = nn.TransformerEncoder(encoder_layer, args.n_encoder_layers, nn.LayerNorm(dim), False)
        self.query = nn.Parameter(0.02 * torch.randn(1, args.chunk_size, dim))
        self.decoder = nn.TransformerDecoder(decoder_layer, args.n_decoder_layers, nn.LayerNorm(dim))
        self.action_head = nn.Linear(dim, sizes["action"])
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

    def forward(self, z, state, environment_state, *frames):
        """Chunks (n, chunk_size, 6) from z (n, latent_dim) and the observation, all normalised; frames as they are."""
        tokens = [self.latent_proj(z)[:, None], self.state_proj(state)[:, None]]
        if self.cameras:
            x = torch.cat(frames, dim=3).permute(0, 3, 1, 2) / 255.0 - 0.5  # (n, 3 * cameras, size, size)
            tokens.append(self.frames_proj(x).transpose(1, 2))
        else:
            tokens.append(self.environment_state_proj(environment_state)[:, None])
        memory = self.encoder(torch.cat(tokens, dim=1) + self.token)  # (n, tokens, dim)
        return self.action_head(self.decoder(self.query.expand(len(z), -1, -1), memory))

    def predict(self, state, *seen):
        """Chunks (n, chunk_size, 6) of absolute joint targets, in LeRobot's units as the observation is.

        `seen` is the environment_state (n, 15), or the frames (n, size, size, 3) uint8 of each camera.
        """
        environment_state, frames = (torch.zeros_like(state[:, :1]), seen) if self.cameras else (*seen, ())
        shape = len(state), self.latent_dim
        z = (torch.randn(shape) if self.sample else torch.zeros(shape)).to(state.device)
        chunks = self(z, *self.normalizer.observation(state, environment_state), *frames)
        return self.normalizer.unnormalize(chunks, state)


def make_network(checkpoint):
    """Rebuild the network from a checkpoint alone; raises UserError if its parts do not fit."""
    args, sizes = flags_of(Args, checkpoint), checkpoint["sizes"]
    return rebuild(lambda: Network(args, sizes), checkpoint["model"]).eval()


def make_policy(checkpoint, sample=False, device="cpu"):
    """The policy of a checkpoint alone, its `sample` drawing z from the prior; raises as `make_network`."""
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
    return Frames(*observations, chunks, mask, *(demos[camera] for camera in network.cameras))


def masked_mean(errors, mask):
    """Mean of errors (n, chunk_size, 6) over what the mask (n, chunk_size) leaves of the chunks."""
    return errors[mask].mean()


def kl_divergence(mean, logvar):
    """KL divergence of N(mean, exp(logvar)) (n, latent_dim) from N(0, 1): the sum over z, the mean over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(1).mean()


if __name__ == "__main__":
    args = parse(Args)
    device = find_device(args.device)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)

    env, env_kwargs = load_task(args.dataset)  # it is judged by the task that was demonstrated
    env_kwargs["observe_measured"] = args.joints == "measured"
    if args.pixels:
        env_kwargs |= {"pixels": args.pixels, "pixel_size": args.pixel_size}
    seen = args.joints, args.pixels, args.pixel_size
    demos = {key: torch.tensor(rows) for key, rows in load_demos(args.dataset, args.num_demos, env, *seen).items()}
    sizes = {key: demos[key].shape[1] for key in ("state", "environment_state", "action")}
    network = Network(args, sizes)
    frames = make_frames(demos, network, args.chunk_size)
    del demos  # all that the training needs are the frames
    network.to(device)
    frames.to(device)
    optimizer = optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)

    run = Run(args, __file__, total=args.train_steps)
    global_step, losses, seconds = 0, [], 0.0  # of the steps since the last log

    def judge(how):
        parts = {"model": network.state_dict(), "sizes": sizes}
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
        b_states, b_environment_states, b_chunks, b_mask, *b_frames = frames[b_inds]
        mean, logvar = network.encode(b_states, b_chunks, b_mask)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape).to(device)
        l1_loss = masked_mean((network(z, b_states, b_environment_states, *b_frames) - b_chunks).abs(), b_mask)
        kl_loss = kl_divergence(mean, logvar)
        loss = l1_loss + args.kl_weight * kl_loss

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # Logging
        losses.append([l1_loss.item(), kl_loss.item()])
        seconds += time.perf_counter() - step_start
        if global_step % args.log_freq == 0:
            l1_mean, kl_mean = torch.tensor(losses).mean(0).tolist()
            scalars = {
                "charts/learning_rate": optimizer.param_groups[0]["lr"],
                "charts/SPS": len(losses) / seconds,
                "losses/l1_loss": l1_mean,
                "losses/kl_loss": kl_mean,
                "time/update": seconds,
            }
            run.log(global_step, scalars, show="losses/l1_loss")
            losses, seconds = [], 0.0
        if global_step % args.eval_freq == 0 or global_step == args.train_steps:
            judge(validate)
    run.end(global_step)
    judge(report)  # on test episodes, which nothing was chosen by
