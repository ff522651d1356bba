"""act.py and diffusion_policy.py: chunks, losses, schedule and sampler of the diffusion, runs, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_scripts import definitions, flags_of, run_script
from torch.distributions import Normal, kl_divergence

import act
import diffusion_policy
import eval as evaluation
from base_policies import make_base_policy
from env_paper_square import PaperSquareVectorEnv
from lerobot_dataset import load_demos

ROOT = Path(__file__).resolve().parent.parent
IMITATION = {"act.py": act, "diffusion_policy.py": diffusion_policy}
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
    flags = f"--num-episodes 3 --model-path {ROOT}/assets/ppo_residual.pt --output-dir demos"
    subprocess.run([sys.executable, ROOT / "record_demos.py", *flags.split()], cwd=folder, check=True)
    return folder / "demos"


@pytest.fixture(params=["act.py", "act.py --temporal-ensemble-coeff 0.1", "diffusion_policy.py"])
def run(request, demos, monkeypatch, tmp_path):
    """A tiny run: the script's module, its globals at the end."""
    name, *flags = request.param.split()
    script = run_script(name, f"--dataset {demos} {TINY[name]} {' '.join(flags)}", monkeypatch, tmp_path)
    return IMITATION[name], script


def observations(num=5, seed=0):
    """Real ones, in LeRobot's units, off the mean."""
    torch.manual_seed(seed)
    return 10.0 * torch.randn(num, 6), torch.randn(num, 14)


def small_network(module, **args):
    """Untrained, but with statistics as a dataset would leave them."""
    torch.manual_seed(0)
    network = module.Network(module.Args(**{**SMALL[f"{module.__name__}.py"], **args})).eval()
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
    assert mask.int().tolist() == [
        [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]
    ]  # fmt: skip


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
    normalizer = act.Normalizer(relative)
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


def test_noising_at_once_is_noising_step_by_step():
    alphas_cumprod = diffusion_policy.squared_cosine_schedule(20)
    mean, variance, before = 1.0, 0.0, 1.0
    for alpha in alphas_cumprod.tolist():
        beta, before = 1.0 - alpha / before, alpha
        mean, variance = mean * (1.0 - beta) ** 0.5, variance * (1.0 - beta) + beta  # x <- sqrt(1-b) x + sqrt(b) e
        one, none = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
        at = torch.tensor(alpha)[None, None, None]
        assert diffusion_policy.add_noise(one, none, at).item() == pytest.approx(mean, rel=1e-4)
        assert diffusion_policy.add_noise(none, one, at).item() ** 2 == pytest.approx(variance, rel=1e-4)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
@pytest.mark.parametrize("steps", [1, 3, 8, 100])
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
        assert len(asked) == steps and asked == sorted(asked, reverse=True) and asked[-1] == 0


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


@pytest.mark.parametrize("module", IMITATION.values())
def test_relative_chunks_move_with_the_joints(module):
    """Where all else is clamped, an arm that stands elsewhere gets the same chunk, so much farther on."""
    shift = torch.tensor([0.0, 0.0, 50.0, 0.0, 0.0, 0.0])
    state, environment_state = observations(1)
    state[:, 2] = 1000.0
    for relative in (True, False):
        network = small_network(module, relative_actions=relative)
        with torch.no_grad():
            one, other = (network.predict(state + k * shift, environment_state) for k in (0, 1))
        torch.testing.assert_close(other - one, (relative * shift).expand_as(one), atol=1e-3, rtol=1e-3)


def test_a_run_leaves_checkpoints_that_play_alike_everywhere(run, demos):
    module, script = run
    run_dir = script["run_dir"].resolve()
    assert {"args.json", "best.pt", "last.pt", "results.json"} <= {path.name for path in run_dir.iterdir()}
    assert json.loads((run_dir / "args.json").read_text())["n_action_steps"] == 2
    assert script["checkpoint"]["global_step"] == 4
    raw = torch.load(run_dir / "last.pt", weights_only=True)
    checkpoint = evaluation.load_checkpoint(run_dir / "last.pt")
    assert checkpoint["script"] == raw["script"] == module.__name__ and "num_threads" in checkpoint["args"]
    state_mean = load_demos(demos)["state"].mean(0)
    np.testing.assert_allclose(checkpoint["model"]["normalizer.state_mean"], state_mean, atol=1e-3)
    policies = [
        script["policy"],
        module.make_policy(checkpoint),
        make_base_policy("il", il_checkpoint=str(run_dir / "last.pt")),
    ]
    envs = PaperSquareVectorEnv(3, num_threads=1, **checkpoint["env_kwargs"])
    obs, _ = envs.reset(seed=0)
    for policy in policies:
        policy.reset(np.ones(3, dtype=bool))
    moved = 0.0
    for _ in range(5):  # two chunks and a half
        actions = [policy(obs) for policy in policies]
        np.testing.assert_array_equal(actions[0], actions[1])
        np.testing.assert_array_equal(actions[0], actions[2])
        moved += np.abs(actions[0]).sum()
        obs, *_ = envs.step(actions[0])
    assert moved > 0.0
    envs.close()
    events = EventAccumulator(str(run_dir)).Reload()
    groups = {key.split("/")[0] for key in events.Tags()["scalars"]}
    assert groups == {"charts", "losses", "time", "eval"}
    assert [scalar.step for scalar in events.Scalars("charts/SPS")] == [2, 4]
    assert [scalar.step for scalar in events.Scalars("eval/success_rate")] == [0, 4]


@pytest.mark.parametrize("name", IMITATION)
def test_same_seed_same_weights_however_often_it_is_evaluated(name, demos, monkeypatch, tmp_path):
    models = []
    for seed, eval_freq in ((3, 1000), (3, 1), (4, 1000)):
        flags = f"--dataset {demos} {TINY[name]} --seed {seed} --eval-freq {eval_freq} --exp-name {seed}-{eval_freq}"
        models.append(run_script(name, flags, monkeypatch, tmp_path)["checkpoint"]["model"])
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert any(not torch.equal(models[0][key], models[2][key]) for key in models[0])


@pytest.mark.parametrize("name", IMITATION)
def test_a_short_training_reproduces_the_chunks_of_a_demonstration(name, demos, monkeypatch, tmp_path):
    sizes = {
        "act.py": "--dim-model 32 --n-heads 2 --dim-feedforward 64 --dropout 0",
        "diffusion_policy.py": "--channels 32 --ema-decay 0.98",
    }
    flags = "--num-demos 1 --chunk-size 4 --n-action-steps 2 --train-steps 400 --batch-size 32 --learning-rate 3e-3"
    flags += f" --test-episodes 1 --eval-episodes 1 --num-threads 1 --torch-threads 1 {sizes[name]}"
    script = run_script(name, f"--dataset {demos} {flags}", monkeypatch, tmp_path)
    rows = {key: torch.tensor(column) for key, column in load_demos(demos, 1).items()}
    errors = {}
    fresh = script["Network"](script["args"])
    fresh.normalizer.load_state_dict(script["network"].normalizer.state_dict())
    for steps, network in ((0, fresh), (400, IMITATION[name].make_network(script["checkpoint"]))):
        with torch.no_grad():
            chunks = network.eval().predict(rows["state"], rows["environment_state"])
        for k in range(4):  # by hand: the k-th action of the chunk is the one recorded k frames later
            wanted = rows["action"][k:]
            errors[steps, k] = (chunks[: len(wanted), k] - wanted).abs().mean().item()
    for k in range(4):
        assert errors[400, k] < 0.2 < errors[0, k], errors  # deg
    evaluations = json.loads((script["run_dir"] / "results.json").read_text())["evaluations"]
    assert [row["global_step"] for row in evaluations] == [0, 400]


def test_checkpoints_fit_into_git(tmp_path):
    for module in IMITATION.values():
        args = module.Args()
        torch.save(module.make_checkpoint(args, module.Network(args), 0), tmp_path / "last.pt")
        assert (tmp_path / "last.pt").stat().st_size < 2_000_000


@pytest.mark.parametrize("module", IMITATION.values())
def test_checkpoints_that_do_not_fit_are_one_line(module, tmp_path):
    network = small_network(module)
    whole = module.make_checkpoint(module.Args(**SMALL[f"{module.__name__}.py"]), network, 0)
    module.make_network(whole)
    weights = whole["model"]
    for damage in (
        {"args": {**whole["args"], "chunk_size": 3}},
        {"args": {**whole["args"], "n_action_steps": 5}},
        {"args": {**whole["args"], "nonsense": 1}},
        {"args": {**whole["args"], "chunk_size": "many"}},
        {"model": {key: weights[key] for key in list(weights)[:-1]}},
        {"model": {**weights, "more": torch.zeros(1)}},
        {"model": {}},
        {"model": None},
    ):
        with pytest.raises(ValueError) as error:
            module.make_policy({**whole, **damage})
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    evaluation.save_checkpoint(whole, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="half.pt is not a checkpoint"):
        make_base_policy("il", il_checkpoint=str(tmp_path / "half.pt"))


BAD_INPUT = {
    "--n-action-steps 17": "n-action-steps",
    "--chunk-size 0": "chunk-size",
    "--train-steps 0": "train-steps",
    "--batch-size -1": "batch-size",
    "--learning-rate nan": "learning-rate",
    "--weight-decay -1": "weight-decay",
    "--num-demos 100": "100",
    "--seed -1": "seed",
    "--dataset nowhere": "nowhere",
}
BAD_INPUT_OF_ACT = {
    "--latent-dim 0": "latent-dim",
    "--kl-weight -1": "kl-weight",
    "--temporal-ensemble-coeff -1": "temporal-ensemble-coeff",
    "--dropout 1": "dropout",
    "--n-heads 5": "n-heads",
}
BAD_INPUT_OF_DIFFUSION = {
    "--num-inference-steps 101": "num-inference-steps",
    "--ema-decay 1": "ema-decay",
    "--channels 12": "channels",
    "--chunk-size 9 --n-action-steps 4": "chunk-size",
}


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        *[("act.py", *item) for item in (BAD_INPUT | BAD_INPUT_OF_ACT).items()],
        *[("diffusion_policy.py", *item) for item in (BAD_INPUT | BAD_INPUT_OF_DIFFUSION).items()],
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(name, flags, expected, demos, monkeypatch, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        run_script(name, f"--dataset {demos} {flags}", monkeypatch, tmp_path)
    error = capfd.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_two_scripts_have_the_same_order_and_the_flags_of_the_others():
    one, other = (definitions(name) for name in IMITATION)
    order = [[name for name in script if name in one.keys() & other.keys()] for script in (one, other)]
    assert order[0] == order[1]
    own, shared = flags_of("act.py"), flags_of("ppo.py")
    for name in ("exp_name", "track", "wandb_project", "capture_video", "eval_episodes", "test_episodes"):
        assert own[name] == shared[name]
