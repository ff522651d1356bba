"""DAgger (arXiv 1011.0686) from pixels: a student that sees cameras and where its joints were sent imitates a teacher
that is told where the sheet is. The student acts, the teacher says what it would have done there, and the student
learns from all that was ever said.

    python dagger.py            # 6 minutes on two cores, 2.7 GB: 98 % of held-out episodes, where the teacher has 99

The policy is a base like any other: python ppo_residual.py --base-policy il --il-checkpoint runs/NAME/last.safetensors
"""

import os
import time
import zlib
from dataclasses import dataclass

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch loads: threads that wait leave busy cores to others

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim

from base_policies import FrozenILPolicy, joint_targets, joints_to_lerobot, joints_to_rad
from env_paper_square import OBS, OBS_SCALE, OBS_ZERO, EnvArgs, env_kwargs, eval_kwargs, kinematics
from eval import load_policy, report, validate
from pixels import PixelArgs, draw_looks, pixel_kwargs
from runs import Episodes, Real, Run, RunArgs, Whole, env_of, find_device, flags_of, parse, rebuild

ARM_ROWS = np.r_[OBS["joint_target"], OBS["fingertip_pos"]]
POSE_ROWS = np.r_[OBS["sheet_pos"], OBS["sheet_yaw"]]  # of an observation


@dataclass
class Args(RunArgs, EnvArgs, PixelArgs):
    torch_threads: Whole[1, 256] = 2
    """torch's threads; there is no physics while it trains"""
    save_freq: Whole[1, 10**10] = 20_000
    """environment steps between saves of the state for --resume; it is also saved when the run is stopped"""
    eval_freq: Whole[1, 10**10] = 20_000
    """environment steps between evaluations on held-out validation episodes"""

    # DAgger
    teacher: str = "assets/ppo_residual.safetensors"
    """checkpoint of the policy that is imitated"""
    total_timesteps: Whole[1, 10**10] = 60_000
    """environment steps to train for, over all environments; their frames are kept in memory"""
    num_envs: Whole[1, 32_768] = 16
    """environments stepped together"""
    num_steps: Whole[1, 10**6] = 64
    """environment steps between updates, per environment"""
    teacher_steps: Whole[0, 10**10] = 15_000
    """environment steps over which the share of episodes in which the teacher acts falls from 1 to 0, beta"""
    redraw_looks: bool = True
    """draw cameras, light and colours anew at every step of the training, of which the student has no memory"""
    utd: Real[1e-4, 100] = 0.3
    """update-to-data ratio: gradient steps per environment step"""
    batch_size: Whole[1, 65_536] = 64
    """frames of each camera per gradient step"""
    learning_rate: Real[1e-12, 1] = 1e-3
    """step size of Adam"""
    anneal_lr: bool = True
    """anneal the step size linearly to zero"""
    pose_weight: Real[0, 1e6] = 5.0
    """weight of the error of where the student believes the sheet to be, beside that of its action"""
    hidden_size: Whole[1, 8192] = 256
    """units of each hidden layer"""

    def __post_init__(self):
        super().__post_init__()
        if not self.pixels:
            raise ValueError("--pixels needs a camera")
        if self.num_envs * self.num_steps > self.total_timesteps:
            raise ValueError("num_envs * num_steps exceeds --total-timesteps")


class Network(nn.Module):
    """From frames (n, size, size, 3) uint8 of each camera, and joints, to an action and where the sheet is."""

    chunk_size = n_action_steps = 1  # as an imitator, it predicts the next joint target and no other
    temporal_ensemble_coeff, joints = 0.0, "commanded"

    def __init__(self, cameras, size, hidden_size, act_scale):
        super().__init__()
        self.cameras, self.act_scale = cameras, act_scale
        self.encoder = nn.Sequential(
            nn.Conv2d(3 * len(cameras), 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
        )
        side = ((size - 8) // 4 - 3) // 2 - 1  # of what it makes of a frame
        self.trunk = nn.Sequential(nn.Linear(64 * side**2, hidden_size), nn.LayerNorm(hidden_size), nn.ReLU())
        self.pose_head = nn.Linear(hidden_size, 4)
        self.action_head = nn.Sequential(
            nn.Linear(hidden_size + 4 + 9, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, 6),
        )

    def forward(self, arm, *frames):
        """Actions (n, 6) and the sheet's POSE_ROWS (n, 4), from ARM_ROWS (n, 9) and each camera's frames."""
        x = torch.cat(frames, dim=3).permute(0, 3, 1, 2) / 255.0 - 0.5  # (n, 3 * cameras, size, size)
        x = self.trunk(self.encoder(x))
        pose = self.pose_head(x)
        return self.action_head(torch.cat([x, pose, arm], dim=1)), pose

    def predict(self, state, *frames):
        """The next joint target (n, 1, 6), in LeRobot's units as the joints (n, 6) are."""
        joint_target = joints_to_rad(state.cpu().numpy())
        action, _ = self(torch.from_numpy(arm_rows(joint_target)).to(state.device), *frames)
        target = joint_target + self.act_scale * action.clamp(-1.0, 1.0).cpu().numpy()
        return torch.from_numpy(joints_to_lerobot(target))[:, None]


def arm_rows(joint_target):
    """What needs no camera, (n, 9) float32: joint targets (n, 6), rad, and the fingertip there, as observations are."""
    fingertip, _ = kinematics(joint_target)
    rows = np.concatenate([joint_target, fingertip], axis=1)
    return ((rows - OBS_ZERO[ARM_ROWS]) * OBS_SCALE[ARM_ROWS]).astype(np.float32)


class Buffer:
    """All that was ever seen and said: up to `capacity` frames of each camera, and what belongs to them."""

    def __init__(self, capacity, cameras, size):
        self.size = 0
        self.frames = {name: torch.zeros((capacity, size, size, 3), dtype=torch.uint8) for name in cameras}
        self.arms, self.poses, self.actions = (torch.zeros((capacity, dim)) for dim in (9, 4, 6))

    def add(self, frames, arms, poses, actions):
        """A step of every environment, arrays (num_envs, ...)."""
        some = slice(self.size, self.size + len(arms))
        for name, x in frames.items():
            self.frames[name][some] = torch.from_numpy(x)
        for x, rows in ((self.arms, arms), (self.poses, poses), (self.actions, actions)):
            x[some] = torch.from_numpy(rows)
        self.size += len(arms)

    def sample(self, batch_size):
        """A batch of arms, poses, actions, and each camera's frames."""
        b_inds = torch.randint(self.size, (batch_size,))
        return [x[b_inds] for x in (self.arms, self.poses, self.actions, *self.frames.values())]

    def state_dict(self):
        """The part that is filled, frames compressed to a tenth, for --resume."""
        films = {name: zlib.compress(x[: self.size].numpy(), level=1) for name, x in self.frames.items()}
        films = {name: torch.frombuffer(bytearray(film), dtype=torch.uint8) for name, film in films.items()}
        rows = {name: getattr(self, name)[: self.size] for name in ("arms", "poses", "actions")}
        return {"size": self.size, "films": films, **rows}

    def load_state_dict(self, state):
        self.size = state["size"]
        for name, film in state["films"].items():
            film = np.frombuffer(zlib.decompress(film.numpy()), dtype=np.uint8)
            self.frames[name][: self.size] = torch.from_numpy(film.reshape(-1, *self.frames[name].shape[1:]).copy())
        for name in ("arms", "poses", "actions"):
            getattr(self, name)[: self.size] = state[name]


def make_network(checkpoint):
    """Rebuild the network from a checkpoint alone; raises UserError if its parts do not fit."""
    args = flags_of(Args, checkpoint)
    parts = args.pixels, args.pixel_size, args.hidden_size, args.act_scale
    return rebuild(lambda: Network(*parts), checkpoint["model"]).eval()


def make_policy(checkpoint, sample=False, device="cpu"):
    """The policy of a checkpoint alone; raises as `make_network`."""
    return FrozenILPolicy(checkpoint, env_of(checkpoint), checkpoint["env"]["kwargs"]["act_scale"], device)


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
        **pixel_kwargs(args),
    )
    # The first episodes end early, each at another time: in step, every rollout would hold one phase of an episode only
    episode_steps = np.arange(args.num_envs) * envs.unwrapped.max_episode_steps // args.num_envs
    next_obs, _ = envs.reset(
        seed=np.random.SeedSequence(args.seed).spawn(args.num_envs),  # streams that no held-out episode has
        options={"episode_steps": episode_steps},
    )
    env = type(envs.unwrapped)
    teacher, _, _ = load_policy(args.teacher)
    teacher.reset(np.ones(args.num_envs, dtype=bool))
    network = Network(args.pixels, args.pixel_size, args.hidden_size, args.act_scale).to(device)
    optimizer = optim.Adam(network.parameters(), lr=args.learning_rate, fused=True)

    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    buffer = Buffer(num_iterations * batch_size, args.pixels, args.pixel_size)

    run = Run(args, __file__, total=num_iterations * batch_size)
    episodes = Episodes(args.num_envs)
    global_step, updates_due, beta = 0, 0.0, 1.0
    action_loss = pose_loss = torch.zeros(())
    by_teacher = np.ones(args.num_envs, dtype=bool)  # in which environments the teacher acts
    rng = np.random.default_rng(args.seed)

    def make_checkpoint():
        task = eval_kwargs(args) | pixel_kwargs(args)
        return run.checkpoint(envs, task, global_step, model=network.state_dict())

    def judge(how):
        checkpoint = make_checkpoint()
        how(run, make_policy(checkpoint, device=device), checkpoint)

    run.begin(globals())  # after --resume, all of the above is what it was when the run was saved
    for iteration in range(global_step // batch_size + 1, num_iterations + 1):
        run.save(global_step)  # now and then, and if the run is to stop, which it does here

        # Schedules
        beta = max(0.0, 1.0 - global_step / max(args.teacher_steps, 1))
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1.0 - (iteration - 1) / num_iterations) * args.learning_rate

        # Act, and ask the teacher
        collect_start = time.perf_counter()
        student = make_policy(make_checkpoint(), device=device)
        for _step in range(args.num_steps):
            global_step += args.num_envs
            state = next_obs["state"]
            teacher_action = teacher(state)
            frames = {camera: next_obs[camera] for camera in args.pixels}
            arms = arm_rows(joint_targets(env.to_si(state), env))
            buffer.add(frames, arms, state[:, POSE_ROWS], teacher_action)
            action = np.where(by_teacher[:, None], teacher_action, student(next_obs))

            if args.redraw_looks and args.randomize_arm:
                seeds = rng.integers(2**32, size=(args.num_envs, 4), dtype=np.uint32)
                looks = draw_looks(seeds, args.randomize_camera, args.randomize_looks)
                for name, x in looks.items():
                    envs.unwrapped.drawn[name][:] = x
            next_obs, reward, terminations, truncations, infos = envs.step(action)
            done = terminations | truncations
            episodes.add(reward, terminations, truncations, infos)
            teacher.reset(done)
            by_teacher[done] = rng.random(done.sum()) < beta

        # Update
        update_start = time.perf_counter()
        updates_due += args.utd * batch_size
        for _update in range(int(updates_due)):
            b_arms, b_poses, b_actions, *b_frames = (x.to(device) for x in buffer.sample(args.batch_size))
            action, pose = network(b_arms, *b_frames)
            action_loss = (action - b_actions).square().mean()
            pose_loss = (pose - b_poses).square().mean()
            loss = action_loss + args.pose_weight * pose_loss

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        updates_due %= 1.0
        now = time.perf_counter()

        # Logging, of the last minibatch and of the steps since the last update
        scalars = {
            **episodes.scalars(),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/beta": beta,
            "charts/SPS": batch_size / (now - collect_start),
            "losses/action_loss": action_loss,
            "losses/pose_loss": pose_loss,
            "time/collect": update_start - collect_start,
            "time/update": now - update_start,
        }
        run.log(global_step, scalars, show="losses/action_loss")
        if global_step >= args.eval_freq * (len(run.evaluations) + 1) or iteration == num_iterations:
            judge(validate)
    run.end(global_step)
    judge(report)  # on test episodes, which nothing was chosen by
    envs.close()
