"""A copy of a script is a script: it trains, is stopped, goes on to the last bit, is judged, filmed and recorded from.

Copies are made in a copy of the project, where nothing but the changed files knows of the change.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_imitation import demos  # noqa: F401, a fixture
from test_runs import ROOT, SHORT, assert_one_line, assert_same, kill, only, run

from runs import fingerprint, load_checkpoint

IL = "--base-policy hybrid --hybrid-bases jacobian il --il-checkpoint assets/act.safetensors"
RESIDUALS = ("ppo_residual", "sac_residual")
PLAY = "--n-episodes 2 --num-threads 1 --output-dir results"
FILM = "--save-video --video-episodes 1 --video-height 48 --video-stride 30"
NEW_FLAGS = '''
    factor: float = 1.0
    """a number without limits"""
    count: int = 1
    """another"""
    sizes: list[int] = field(default_factory=lambda: [8, 8])
    """widths of the network"""
    order: Literal[1, 2, 3] = 1
    """a choice of numbers"""
    notes: Path = Path("notes.txt")
    """a path"""'''
PPO_NETWORK = {
    "Linear(input_dim, hidden_size)": "Linear(input_dim, hidden_size[0])",
    "Linear(hidden_size, hidden_size)": "Linear(hidden_size[0], hidden_size[1])",
    "Linear(hidden_size, output_dim)": "Linear(hidden_size[1], output_dim)",
    "args.hidden_size": "args.sizes",
}
NETWORKS = {
    "ppo": PPO_NETWORK,
    "ppo_residual": PPO_NETWORK,
    "sac_residual": PPO_NETWORK | {"norm(hidden_size),\n        nn.ReLU(),\n        nn.Linear(hidden_size[0]":
        "norm(hidden_size[0]),\n        nn.ReLU(),\n        nn.Linear(hidden_size[0]", "norm(hidden_size),":
        "norm(hidden_size[1]),"},
    "dagger": {"args.hidden_size": "args.sizes[0]"},
    "act": {"args.dim_feedforward": "args.sizes[0]"},
    "diffusion_policy": {"args.embedding_size": "args.sizes[0]"},
}  # fmt: skip


@pytest.fixture
def project(tmp_path):
    """A copy of the project to change, and to work in; its episodes are short, to save time."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    short = {"max_episode_steps: int = 400": "max_episode_steps: int = 100", "steps=400": "steps=100"}
    edit(tmp_path / "env_paper_square.py", short)
    return tmp_path


def edit(path, changes):
    """Change a file's text: what it must hold, and what takes its place."""
    text = path.read_text()
    for old, new in changes.items():
        assert old in text, (path, old)
        text = text.replace(old, new)
    path.write_text(text)


def add_flags(path, flags, postponed=False):
    """Add flags, and what they need, to a script."""
    text = re.sub(r"^(class Args\(.*\):)", lambda match: match[1] + flags, path.read_text(), flags=re.MULTILINE)
    imports = "\nfrom dataclasses import field\nfrom pathlib import Path\nfrom typing import Literal\nimport "
    future = "\nfrom __future__ import annotations\n" * postponed
    path.write_text(text.replace("\nimport ", future + imports, 1))


def flags_of(script, demos):  # noqa: F811
    return f"{SHORT[script]} --dataset {demos}" if script in ("act", "diffusion_policy") else SHORT[script]


def train_whole_and_in_parts(folder, script, flags, whole=None):
    """Train `whole` at once, and the script killed, stopped and resumed; asserts that both end alike; the run's folder.

    The moments are gradient steps, of the process that is killed or stopped then.
    """
    whole = run(folder, f"{whole or script} {flags} --exp-name whole")
    assert whole.code == 0, whole.err
    killed = run(folder, f"{script} {flags} --exp-name parts", at=(9, kill))
    assert killed.code == -signal.SIGKILL, killed.err
    run_dir = only(folder, "runs/parts__*")
    for number in (signal.SIGINT, signal.SIGTERM):
        stopped = run(folder, f"{script} --resume {run_dir}", at=(3, lambda number=number: signal.raise_signal(number)))
        assert stopped.code == 128 + number
        assert stopped.err.splitlines()[-1] == f"stopped; go on with: python {script} --resume {run_dir}"
    done = run(folder, f"{script} --resume {run_dir}")
    assert done.code == 0, done.err
    assert_same(folder / only(folder, "runs/whole__*"), folder / run_dir)
    return run_dir, done


def assert_can_be_played(folder, run_dir):
    """Judged by eval.py as its own training judged it, filmed, and recorded from."""
    played = run(folder, f"eval.py --model-path {run_dir}/last.safetensors {PLAY} {FILM}")
    assert played.code == 0, played.err
    reported = json.loads((folder / run_dir / "results.json").read_text())["policies"]
    *_, reported = reported.values()  # after its base
    (judged,) = json.loads((folder / "results/results.json").read_text())["policies"].values()
    assert judged["episodes"] == reported["episodes"]
    (film,) = folder.glob("results/*.mp4")
    assert film.stat().st_size > 1000
    flags = f"--model-path {run_dir}/last.safetensors --num-episodes 2 --num-threads 1 --output-dir recorded"
    recorded = run(folder, f"record_demos.py {flags}")
    assert recorded.code == 0, recorded.err
    assert recording(folder / "recorded", "episode_index")[-1] == 1


def recording(folder, key):
    """A feature of a dataset, (frames, ...)."""
    (path,) = folder.glob("data/chunk-*/file-*.parquet")
    return np.array(pq.read_table(path)[key].to_pylist())


@pytest.mark.parametrize("script", SHORT)
def test_an_unchanged_copy_is_the_script(script, project, demos):  # noqa: F811
    shutil.copy(project / f"{script}.py", project / "mine.py")
    flags = flags_of(script, demos) + f" {IL}" * (script in RESIDUALS)
    run_dir, _ = train_whole_and_in_parts(project, "mine.py", flags, whole=f"{script}.py")
    assert load_checkpoint(project / run_dir / "last.safetensors")["script"] == "mine"
    assert_can_be_played(project, run_dir)


@pytest.mark.parametrize("script", SHORT)
def test_a_copy_with_new_flags_and_another_network(script, project, demos):  # noqa: F811
    mine = project / "mine.py"
    shutil.copy(project / f"{script}.py", mine)
    add_flags(mine, NEW_FLAGS, postponed=script in ("ppo", "sac_residual", "diffusion_policy"))
    edit(mine, NETWORKS[script])
    refused = run(project, f"mine.py {flags_of(script, demos)} --order 4")
    assert refused.code == 2 and "order" in refused.err and not (project / "runs").exists()
    flags = "--sizes 12 10 --factor=-1e30 --count=-3000000000 --order 3 --notes 'a b.txt'"
    run_dir, _ = train_whole_and_in_parts(project, "mine.py", f"{flags_of(script, demos)} {flags}")
    checkpoint = load_checkpoint(project / run_dir / "last.safetensors")
    new = [checkpoint["args"][name] for name in ("sizes", "factor", "count", "order", "notes")]
    assert new == [[12, 10], -1e30, -3_000_000_000, 3, Path("a b.txt")]
    assert any(12 in weight.shape for weight in checkpoint["model"].values())
    assert_can_be_played(project, run_dir)


# What a copy adds before its loop is part of its state

ADDED = """
    target = copy.deepcopy(agent)
    memory = torch.zeros(args.num_envs, 3, dtype=torch.float64)
    statistics = np.zeros(2, dtype=np.float32)
    array_rng, tensor_rng, dice = np.random.default_rng(5), torch.Generator().manual_seed(6), random.Random(7)
    counter, momentum, last = 0, np.float32(0.5), None
    history, table = collections.deque(maxlen=3), collections.defaultdict(list)
    pairs = {1: (0.0, "one"), "two": [torch.zeros(1)]}
    agent.calls = 0

"""
USED = """
        counter, momentum, last, agent.calls = counter + 1, momentum * np.float32(0.9), float(counter), agent.calls + 1
        memory = 0.9 * memory + torch.rand(memory.shape, generator=tensor_rng)
        statistics += array_rng.normal(size=2)
        history.append(dice.random())
        table[counter % 2].append(random.random())
        pairs[1] = (pairs[1][0] + np.random.rand(), "one")
        pairs["two"][0] += torch.rand(1)
        with torch.no_grad():
            for old, new in zip(target.parameters(), agent.parameters(), strict=True):
                old.lerp_(new, 0.1)
            noise = memory.sum() + statistics.sum() + sum(history) + sum(map(len, table.values())) + sum(table[0])
            noise += counter + momentum + (last or 0) + agent.calls + pairs[1][0] + pairs["two"][0].item()
            rewards += 0.1 * noise.float() + target.get_value(obs.flatten(0, 1)).view_as(rewards)

"""


def test_whatever_a_copy_makes_before_its_loop_goes_on(project):
    shutil.copy(project / "ppo_residual.py", project / "mine.py")
    edit(
        project / "mine.py",
        {
            "\nimport time\n": "\nimport collections\nimport copy\nimport random\nimport time\n",
            "\n    # Storage": f"{ADDED}\n    # Storage",
            "\n        # Advantages": f"{USED}\n        # Advantages",
        },
    )
    seeds = "torch.manual_seed(1), random.seed(1), np.random.seed(1)"
    edit(project / "mine.py", {"torch.manual_seed(args.seed)": seeds})
    run_dir, _ = train_whole_and_in_parts(project, "mine.py", SHORT["ppo_residual"])
    whole = project / only(project, "runs/whole__*")
    one, other = (load_checkpoint(path / "state.safetensors") for path in (whole, project / run_dir))
    added = set(re.findall(r"\w+", " ".join(line.partition("=")[0] for line in ADDED.splitlines()))) - {
        "agent",
        "calls",
    }
    assert len(added) > 10 and added <= one["processes"][0].keys()
    for name in added:
        ours, theirs = ({name: state["processes"][0][name]} for state in (one, other))
        assert fingerprint(ours) == fingerprint(theirs), name


def test_what_cannot_be_saved_is_an_error_before_the_training_or_left_alone(project):
    shutil.copy(project / "ppo.py", project / "mine.py")
    edit(project / "mine.py", {"\n    # Storage": "\n    thing = {'inner': [iter([1])]}\n    # Storage"})
    assert_one_line(run(project, f"mine.py {SHORT['ppo']}"), "thing/inner/0 is a list_iterator")
    assert not (project / "runs").exists()
    edit(project / "mine.py", {"thing = ": "_thing = "})
    assert run(project, f"mine.py {SHORT['ppo']}").code == 0


# A new base in one place

NOISY = """
class NoisyPolicy(JacobianIKPolicy):
    def __init__(self, env, act_scale, scale):
        super().__init__(env, act_scale)
        self.rng, self.scale, self.acted = np.random.default_rng(3), scale, np.zeros(0)

    def reset(self, mask):
        self.acted = np.where(mask, 0, self.acted) if len(mask) == len(self.acted) else np.zeros(len(mask))

    def __call__(self, obs, mask=None):
        self.acted[slice(None) if mask is None else mask] += 1
        return super().__call__(obs, mask) + self.scale * self.rng.normal(size=(len(obs), 6))


BASES = {"""


def test_a_new_base_is_played_and_corrected_and_the_old_ones_are_as_before(project):
    old = f"eval.py --model-path assets/ppo_residual.safetensors --compare-base {PLAY}"
    runs = [run(project, old)]
    line = '    "noisy": lambda args, env, act_scale, **_: NoisyPolicy(env, act_scale, args.noise_scale),'
    flag = '    noise_scale: float = 0.1\n    """noisy: what it adds to the action"""'
    edit(
        project / "base_policies.py",
        {"\nBASES = {": f"{NOISY}\n{line}", "class BaseFlags(Flags):": f"class BaseFlags(Flags):\n{flag}"},
    )
    runs.append(run(project, old))
    assert runs[0].code == 0 and runs[0].out == runs[1].out
    assert run(project, f"eval.py --policy noisy jacobian --noise-scale 0.5 {PLAY}").code == 0
    noisy, jacobian = json.loads((project / "results/results.json").read_text())["policies"].values()
    assert noisy["mean_return"] != jacobian["mean_return"]
    for script in RESIDUALS:
        flags = f"{SHORT[script]} --base-policy noisy --noise-scale 0.2 --eval-freq 1000"
        run_dir, _ = train_whole_and_in_parts(project, f"{script}.py", flags)
        base = load_policy_state(project / run_dir)
        assert base["acted"].max() > 20 and base["scale"] == 0.2
        played = run(project, f"eval.py --model-path {run_dir}/last.safetensors --compare-base {PLAY}")
        assert played.code == 0 and "base noisy" in played.out
        shutil.rmtree(project / "runs")


def load_policy_state(run_dir):
    (variables,) = load_checkpoint(run_dir / "state.safetensors")["processes"]
    return variables["base_policy"]


# A copy of the environment

ROW = {  # a row of the observation, and a parameter of the task
    "PaperSquare-v0": "Mine-v0",
    "env_paper_square:": "env_mine:",
    '    "hold_counter": (': '    "height": ([0.0], [10.0]),\n    "hold_counter": (',
    '        "hold_counter": hold': '        "height": fingertip[:, 2:] + lift,\n        "hold_counter": hold',
    "    hold_counter: np.ndarray,\n": "    hold_counter: np.ndarray,\n    lift: float,\n",
    "self._tape_half_size, self._seen_inside\n": "self._tape_half_size, self._seen_inside, self.lift\n",
    "    reach_weight: Real": '    lift: Real[-1, 1] = 0.0\n    """added to the height, m"""\n    reach_weight: Real',
}  # fmt: skip


@pytest.mark.parametrize("script", ["ppo", "ppo_residual", "sac_residual"])
def test_a_policy_is_judged_and_recorded_in_the_environment_it_was_trained_in(script, project):
    shutil.copy(project / "env_paper_square.py", project / "env_mine.py")
    edit(project / "env_mine.py", ROW)
    shutil.copy(project / f"{script}.py", project / "mine.py")
    edit(project / "mine.py", {"env_paper_square": "env_mine", "PaperSquare-v0": "Mine-v0"})
    trained = run(project, f"mine.py {SHORT[script]} --lift 0.5")
    assert trained.code == 0, trained.err
    run_dir = only(project, "runs/*")
    path = run_dir / "last.safetensors"
    env = load_checkpoint(project / path)["env"]
    assert env["module"] == "env_mine" and env["kwargs"]["lift"] == 0.5 and "height" in env["rows"]
    assert_can_be_played(project, run_dir)
    state = recording(project / "recorded", "observation.environment_state")
    assert state.shape[1] == 16 and state[:, -2].min() > 4.9  # the fingertip's height, lifted
    imitated = run(project, f"act.py {SHORT['act']} --dataset recorded --exp-name imitation")
    assert imitated.code == 0, imitated.err
    (imitation,) = project.glob("runs/imitation__*/last.safetensors")
    assert load_checkpoint(imitation)["env"] == env

    other = run(project, f"{script}.py {SHORT[script]} --exp-name other")
    assert other.code == 0
    both = f"eval.py --model-path {path} {only(project, 'runs/other__*')}/last.safetensors"
    refused = run(project, f"{both} {PLAY}")
    assert_one_line(refused, "trained in different environments: evaluate them apart")

    edit(project / "env_mine.py", {"([0.0], [10.0])": "([0.0], [11.0])"})
    for command in (f"eval.py {PLAY}", "record_demos.py --output-dir again"):
        refused = run(project, f"{command} --model-path {path}")
        assert_one_line(refused, "trained on other observations than those of env_mine.py: it saw ('height'")
        assert refused.err.count("'height'") == 2 and "hold_counter" not in refused.err
    assert not (project / "again").exists()


# A memory is forgotten where its episode ends

MEMORY = {
    "    def reset(self, mask):\n        \"\"\"Forget the episodes before": """    memory = np.zeros(0)

    def remember(self, x):
        self.memory = 0.95 * self.memory + x.numpy()
        return torch.from_numpy(np.clip(self.memory, -5, 5).astype(np.float32))

    def reset(self, mask):
        if len(mask) != len(self.memory):
            self.memory = np.zeros((len(mask), 1))
        self.memory = np.where(mask[:, None], 0.0, self.memory)
        \"\"\"Forget the episodes before""",
    "        with torch.inference_mode():\n            mean": "        x = self.remember(x)\n"
    "        with torch.inference_mode():\n            mean",
}  # fmt: skip


@pytest.mark.parametrize("script", ["ppo", "ppo_residual", "sac_residual"])
def test_a_memory_is_forgotten_with_its_episode(script, project):
    """One environment that plays all episodes in a row plays them as one for each does, which are the training's."""
    shutil.copy(project / f"{script}.py", project / "mine.py")
    edit(project / "mine.py", MEMORY)
    trained = run(project, f"mine.py {SHORT[script]} --learning-rate 0.1 --eval-episodes 3 --test-episodes 3")
    assert trained.code == 0, trained.err
    path = only(project, "runs/*/last.safetensors")
    reported = json.loads((project / path.parent / "results.json").read_text())
    *_, reported_policy = reported["policies"].values()
    commands = {"validation": "--seed 1000000", "test": ""}
    alone = {}
    for name, flags in commands.items():
        flags = f"--model-path {path} --num-threads 1 --n-episodes 3 --num-envs 1 --output-dir {name} {flags}"
        assert run(project, f"eval.py {flags}").code == 0
        (alone[name],) = json.loads((project / name / "results.json").read_text())["policies"].values()
    assert alone["validation"]["mean_return"] == pytest.approx(reported["evaluations"][-1]["mean_return"], abs=1e-6)
    assert alone["test"]["mean_return"] == pytest.approx(reported_policy["mean_return"], abs=1e-6)
    demos = []  # noqa: F811
    for num_envs in (1, 3):
        flags = f"--model-path {path} --num-envs {num_envs} --num-episodes 3 --output-dir demos_{num_envs}"
        assert run(project, f"record_demos.py {flags}").code == 0
        demos.append(recording(project / f"demos_{num_envs}", "action"))
    np.testing.assert_allclose(*demos, atol=0.1)  # degrees


# The source that a run keeps


def test_an_old_checkpoint_is_played_by_the_source_of_its_run(project):
    shutil.copy(project / "ppo_residual.py", project / "mine.py")
    add_flags(project / "mine.py", NEW_FLAGS)
    assert run(project, f"mine.py {SHORT['ppo_residual']}").code == 0
    run_dir = only(project, "runs/*")
    play = f"eval.py --model-path {run_dir}/last.safetensors {PLAY}"
    before = run(project, play)
    source = (project / "mine.py").read_text()
    hint = "--script runs/NAME/mine.py"
    for changed, told in (
        (source.replace("nn.Linear(input_dim, hidden_size)", "nn.Linear(input_dim, 7)"), "do not fit the network"),
        ((project / "ppo_residual.py").read_text(), hint),  # whose flags are fewer
        (None, hint),
    ):
        (project / "mine.py").unlink()
        if changed:
            (project / "mine.py").write_text(changed)
        refused = run(project, play)
        assert refused.code == 2 and refused.err.startswith("\nerror: ") and told in refused.err
        for command in (play, f"record_demos.py --model-path {run_dir}/last.safetensors --num-episodes 1"):
            done = run(project, f"{command} --script {run_dir}/mine.py")
            assert done.code == 0 and (command != play or done.out == before.out), done.err
        shutil.rmtree(project / "demos")


def test_a_script_in_a_subfolder_and_a_name_with_spaces(project):
    """What is printed can be run as it is."""
    (project / "my ideas").mkdir()
    shutil.copy(project / "ppo.py", project / "my ideas/mine.py")
    name = "lr=1e-3, a:0.5 $HOME"
    command = f"'my ideas/mine.py' {SHORT['ppo']} --exp-name '{name}'"
    stopped = run(project, command, at=(3, lambda: signal.raise_signal(signal.SIGINT)), path=[project])
    assert stopped.code == 128 + signal.SIGINT, stopped.err
    printed = re.search("stopped; go on with: (.*)", stopped.err)[1]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", printed], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and only(project, "runs/*").name.startswith(f"{name}__1__"), done.stderr
    printed = re.search("watch it: python (.*)", done.stdout)[1]
    words = shlex.split(printed)
    assert words[-2:] == ["--script", f"{only(project, 'runs/*')}/mine.py"]
    assert run(project, f"{printed} {FILM} {PLAY}").code == 0
    assert_one_line(run(project, shlex.join(words[:-2])), "there is no")
