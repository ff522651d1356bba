"""act.py and diffusion_policy.py: chunks, losses, schedule and sampler of the diffusion, runs."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import IMITATION, ROOT, run_script
from torch.distributions import Normal, kl_divergence

import act
import diffusion_policy
import eval as evaluation
from base_policies import BaseFlags, make_base
from lerobot_dataset import load_demos

SIZES = {"state": 6, "environment_state": 15, "action": 6}
SMALL = {  # networks
    "act.py": {"chunk_size": 4, "n_action_steps": 2, "dim_model": 16, "n_heads": 2, "dim_feedforward": 32},
    "diffusion_policy.py": {"chunk_size": 4, "n_action_steps": 2, "channels": 8, "embedding_size": 16},
}
TINY_RUN = (
    "--train-steps 4 --batch-size 8 --log-freq 2 --eval-episodes 1 --test-episodes 1 --num-threads 1 --torch-threads 1"
)
TINY = {
    name: " ".join([TINY_RUN, *(f"--{flag.replace('_', '-')} {value}" for flag, value in sizes.items())])
    for name, sizes in SMALL.items()
}


@pytest.fixture(scope="session")
def demos(tmp_path_factory):
    """A dataset of three episodes, in a folder."""
    folder = tmp_path_factory.mktemp("dataset")
    flags = f"--num-episodes 3 --model-path {ROOT}/assets/ppo_residual.safetensors --output-dir demos"
    subprocess.run([sys.executable, ROOT / "record_demos.py", *flags.split()], cwd=folder, check=True)
    return folder / "demos"


def observations(num=5, seed=0):
    """Real ones, in LeRobot's units, off the mean."""
    torch.manual_seed(seed)
    return 10.0 * torch.randn(num, 6), torch.randn(num, 15)


def small_network(module, **args):
    """Untrained, but with statistics as a dataset would leave them."""
    torch.manual_seed(0)
    network = module.Network(module.Args(**{**SMALL[f"{module.__name__}.py"], **args}), SIZES).eval()
    states, environment_states = observations(50, seed=1)
    chunks, mask = states[:, None] + torch.randn(50, 4, 6), torch.ones(50, 4, dtype=torch.bool)
    network.normalizer.fit(states, environment_states, chunks, mask)
    return network


def test_chunks_stay_in_their_episode_and_the_mask_tells_the_padding():
    action = torch.arange(7.0)[:, None].expand(7, 6)
    episode = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    chunks, mask = act.make_chunks(action, episode, 4)
    assert chunks.shape == (7, 4, 6) and torch.equal(chunks[..., 0], chunks[..., 5])
    assert chunks[..., 0].tolist() == [
        [0, 1, 2, 2], [1, 2, 2, 2], [2, 2, 2, 2], [3, 3, 3, 3], [4, 5, 6, 6], [5, 6, 6, 6], [6, 6, 6, 6]
    ]  # fmt: skip
    assert mask.sum(1).tolist() == [3, 2, 1, 1, 3, 2, 1] and (mask[:, :-1] >= mask[:, 1:]).all()


def test_padding_counts_in_no_loss_and_in_no_z():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    errors = torch.ones(2, 4, 6)
    errors[1, 2] = 6.0
    changed = errors.clone()
    changed[~mask] = 100.0
    assert act.masked_mean(errors, mask) == act.masked_mean(changed, mask) == (4 * 1.0 + 6.0) / 5
    network = small_network(act)
    state, _ = observations(2)
    with torch.no_grad():
        for one, other in zip(network.encode(state, errors, mask), network.encode(state, changed, mask), strict=True):
            torch.testing.assert_close(one, other)
        other, _ = network.encode(state, changed, torch.ones_like(mask))
        assert not torch.allclose(network.encode(state, errors, mask)[0], other)


@pytest.mark.parametrize("relative", [True, False])
def test_normalisation_has_mean_zero_and_deviation_one_and_goes_back(relative):
    normalizer = act.Normalizer(relative, SIZES)
    state, environment_state = observations(400)
    state[:, 5], environment_state[:, 12] = 7.0, 0.0  # constant
    chunks = 3.0 + state[:, None] + 2.0 * torch.randn(400, 4, 6)
    mask = torch.rand(400, 4) < 0.7
    chunks[~mask] = 1e6  # padding, that no statistic may see
    normalizer.fit(state, environment_state, chunks, mask)
    normalized = normalizer.normalize(chunks, state)
    np.testing.assert_allclose(normalized[mask].mean(0), 0.0, atol=1e-3)
    np.testing.assert_allclose(normalized[mask].std(0), 1.0, atol=2e-3)
    torch.testing.assert_close(normalizer.unnormalize(normalized, state)[mask], chunks[mask], atol=1e-3, rtol=1e-5)
    if relative:
        expected = (chunks - state[:, None])[mask]
        np.testing.assert_allclose(normalizer.action_mean, expected.numpy().mean(0), atol=1e-4)

    seen, around = normalizer.observation(state, environment_state)
    np.testing.assert_allclose(seen[:, :5].std(0), 1.0, atol=2e-3)
    assert not seen[:, 5].any() and not around[:, 12].any()
    environment_state[:, 12], state[:, 0] = 0.1, 1e4  # what never varied does, and the arm is where none has been
    seen, around = normalizer.observation(state, environment_state)
    np.testing.assert_allclose(around[:, 12], 0.1, rtol=1e-6)
    assert (seen[:, 0] == 5.0).all()


def test_kl_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 9, 5)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(act.kl_divergence(mean, logvar), expected)


def test_z_is_zero_when_it_acts():
    network = small_network(act)
    state, environment_state = observations()
    with torch.no_grad():
        chunks = network.predict(state, environment_state)
        normalized = network(torch.zeros(5, 8), *network.normalizer.observation(state, environment_state))
        torch.testing.assert_close(network.normalizer.normalize(chunks, state), normalized, atol=1e-4, rtol=1e-4)
        for name, parameter in network.named_parameters():
            if name.startswith("vae_"):
                parameter.fill_(float("nan"))
        assert torch.equal(network.predict(state, environment_state), chunks)


def test_schedule_is_the_squared_cosine():
    alphas_cumprod = diffusion_policy.squared_cosine_schedule(100).numpy()
    t = np.arange(1, 101)
    f = np.cos((t / 100 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alphas_cumprod[:-1], f[:-1], rtol=1e-5)
    assert alphas_cumprod[-1] == pytest.approx(0.001 * f[-2], rel=1e-5)  # the last beta is clipped at 0.999


@pytest.mark.parametrize(
    ("steps", "prediction_type"), [(1, "sample"), (3, "sample"), (100, "sample"), (3, "epsilon"), (100, "epsilon")]
)
def test_ddim_with_a_perfect_denoiser_recovers_what_was_noised(steps, prediction_type):
    torch.manual_seed(0)
    network = small_network(diffusion_policy, prediction_type=prediction_type)
    alphas_cumprod = diffusion_policy.squared_cosine_schedule(100)
    x0, asked = torch.randn(5, 4, 6), []

    def oracle(x, timesteps, *observation):
        alpha = alphas_cumprod[timesteps][:, None, None]
        asked.extend(set(timesteps.tolist()))
        return x0 if prediction_type == "sample" else (x - alpha.sqrt() * x0) / (1.0 - alpha).sqrt()

    network.forward = oracle
    start = torch.randn(5, 4, 6)
    for low, high in ((-10.0, 10.0), (-1.0, 0.5)):
        network.low.fill_(low)
        network.high.fill_(high)
        asked.clear()
        sampled = diffusion_policy.ddim(lambda x, t: network.denoise(x, t, None, None), start, alphas_cumprod, steps)
        torch.testing.assert_close(sampled, x0.clamp(low, high), atol=1e-3, rtol=1e-4)
        assert len(asked) == steps and asked == sorted(asked, reverse=True) and asked[-1] == (99 if steps == 1 else 0)


def test_ddim_steps_along_the_marginals():
    """Whoever estimates zero always keeps its start, scaled as the noise of each timestep is."""
    alphas_cumprod = diffusion_policy.squared_cosine_schedule(100)
    start, seen = torch.randn(2, 4, 6), []
    diffusion_policy.ddim(lambda x, t: seen.append((t, x)) or torch.zeros_like(x), start, alphas_cumprod, 5)
    assert [t for t, _ in seen] == [80, 60, 40, 20, 0]
    for t, x in seen:
        scale = ((1.0 - alphas_cumprod[t]) / (1.0 - alphas_cumprod[80])).sqrt()
        torch.testing.assert_close(x, scale * start)


@pytest.mark.parametrize("module", IMITATION.values())
def test_prediction_is_a_function_of_each_observation_alone(module):
    network = small_network(module)
    observation = observations()
    with torch.no_grad():
        together = network.predict(*observation)
        assert together.shape == (5, 4, 6) and together.dtype == torch.float32
        before = torch.random.get_rng_state()
        assert torch.equal(network.predict(*observation), together)
        assert torch.equal(torch.random.get_rng_state(), before)
        for k in range(5):
            alone = network.predict(*(part[k : k + 1] for part in observation))[0]
            torch.testing.assert_close(alone, together[k], atol=1e-4, rtol=1e-4)
        network.sample = True
        one, other = network.predict(*observation), network.predict(*observation)
        assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("joints", ["commanded", "measured"])
@pytest.mark.parametrize("command", ["act.py", "act.py --temporal-ensemble-coeff 0.1", "diffusion_policy.py"])
def test_a_run_leaves_a_checkpoint_that_plays_alike_as_policy_and_as_base(
    command, joints, demos, monkeypatch, tmp_path
):
    name, *flags = command.split()
    flags += ["--joints", joints] * (joints != "commanded")
    reported = []
    monkeypatch.setattr(evaluation, "report", lambda run, policy, checkpoint: reported.append(policy))
    script = run_script(name, f"--dataset {demos} {TINY[name]} {' '.join(flags)}", monkeypatch, tmp_path)
    path = script["run"].dir / "last.safetensors"
    from_file, task, checkpoint = evaluation.load_policy(path)
    assert checkpoint["global_step"] == 4 and checkpoint["args"]["n_action_steps"] == 2
    state_mean = load_demos(demos, joints=joints)["state"].mean(0)
    np.testing.assert_allclose(checkpoint["model"]["normalizer.state_mean"], state_mean, atol=1e-3)
    policies = [*reported, from_file, make_base("il", BaseFlags(il_checkpoint=str(path)))]
    envs = task(3, num_threads=1)
    obs, _ = envs.reset(seed=0)
    assert envs.observe_measured == (joints == "measured")
    for policy in policies:
        policy.reset(np.ones(3, dtype=bool))
        assert policy.measured == envs.observe_measured
    moved = 0.0
    for _ in range(5):  # two chunks and a half
        one, *others = [policy(obs) for policy in policies]
        for other in others:
            np.testing.assert_array_equal(one, other)
        moved += np.abs(one).sum()
        obs, *_ = envs.step(one)
    envs.close()
    assert moved > 0.0 and len(policies) == 3
    events = EventAccumulator(str(path.parent)).Reload()
    assert {key.split("/")[0] for key in events.Tags()["scalars"]} == {"charts", "losses", "time", "eval"}
    assert [scalar.step for scalar in events.Scalars("charts/SPS")] == [2, 4]
    assert [scalar.step for scalar in events.Scalars("eval/success_rate")] == [0, 4]


@pytest.mark.parametrize("name", IMITATION)
def test_an_imitator_is_judged_in_the_task_that_was_demonstrated(name, demos, monkeypatch, tmp_path):
    shutil.copytree(demos, tmp_path / "wide")
    path = tmp_path / "wide" / "meta" / "environment.json"
    env = json.loads(path.read_text())
    path.write_text(json.dumps(env | {"kwargs": env["kwargs"] | {"tape_half_size": 0.12, "act_scale": 0.03}}))
    judged = []
    monkeypatch.setattr(evaluation, "report", lambda run, policy, checkpoint: judged.append((policy, checkpoint)))
    run_script(name, f"--dataset wide {TINY[name]}", monkeypatch, tmp_path)
    ((policy, checkpoint),) = judged
    assert evaluation.task_of(checkpoint)(1).tape_half_size == 0.12 and policy.act_scale == 0.03


@pytest.mark.parametrize("name", IMITATION)
def test_same_seed_same_weights_however_often_it_is_evaluated(name, demos, monkeypatch, tmp_path):
    models = []
    for eval_freq in (1000, 2):
        flags = f"--dataset {demos} {TINY[name]} --seed 3 --eval-freq {eval_freq}"
        script = run_script(name, flags, monkeypatch, tmp_path)
        models.append(evaluation.load_checkpoint(script["run"].dir / "last.safetensors")["model"])
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", IMITATION)
def test_a_short_training_reproduces_the_chunks_of_a_demonstration(name, demos, monkeypatch, tmp_path):
    sizes = {
        "act.py": "--dim-model 32 --n-heads 2 --dim-feedforward 64 --dropout 0",
        "diffusion_policy.py": "--channels 32 --ema-decay 0.98",
    }
    flags = "--num-demos 1 --chunk-size 4 --n-action-steps 2 --train-steps 400 --batch-size 32 --learning-rate 3e-3"
    flags += f" --test-episodes 1 --eval-episodes 1 --num-threads 1 --torch-threads 1 {sizes[name]}"
    script = run_script(name, f"--dataset {demos} {flags}", monkeypatch, tmp_path)
    checkpoint = evaluation.load_checkpoint(script["run"].dir / "last.safetensors")
    rows = {key: torch.tensor(column) for key, column in load_demos(demos, 1, joints="commanded").items()}
    fresh = script["Network"](script["args"], SIZES)
    fresh.normalizer.load_state_dict(script["network"].normalizer.state_dict())
    errors = {}
    for steps, network in ((0, fresh), (400, IMITATION[name].make_network(checkpoint))):
        with torch.no_grad():
            chunks = network.eval().predict(rows["state"], rows["environment_state"])
        for k in range(4):  # by hand: the k-th action of the chunk is the one recorded k frames later
            wanted = rows["action"][k:]
            errors[steps, k] = (chunks[: len(wanted), k] - wanted).abs().mean().item()
    for k in range(4):
        assert errors[400, k] < 0.2 < errors[0, k], errors  # deg
    evaluations = json.loads((script["run"].dir / "results.json").read_text())["evaluations"]
    assert [row["global_step"] for row in evaluations] == [0, 400]
