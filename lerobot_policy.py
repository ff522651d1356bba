"""A folder that LeRobot trained, `OUT/checkpoints/STEP/pretrained_model`, as a frozen base: checked, then run by it.

    python ppo_residual.py --base-policy il --il-checkpoint OUT/checkpoints/STEP/pretrained_model

Nothing else of the project needs LeRobot, which pins an older torch; tests/test_lerobot.py says how to install the two
side by side. Formats: of lerobot 0.4.4.
"""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

from env_paper_square import JOINTS
from runs import UserError

# Its files (train_config.json holds nothing to play), the features that it must have been trained on, and the steps of
# its processors, because LeRobot would import whatever they name
LEROBOT_FILES = re.compile(r"config\.json|model\.safetensors|policy_(pre|post)processor\w*\.(json|safetensors)")
LEROBOT_NEEDED = ("config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json")
LEROBOT_LIMIT = 2**30  # bytes in all: every checkpoint of a residual on such a base holds them
LEROBOT_FEATURES = {"observation.state": [6], "observation.environment_state": [15], "action": [6]}
LEROBOT_TYPES = {"observation.state": "STATE", "observation.environment_state": "ENV", "action": "ACTION"}
LEROBOT_LARGEST, LEROBOT_LAYERS = 10_000, 32  # numbers in config.json, entries of its lists and layers: far above sense
LEROBOT_STEPS = re.compile(r"(rename_observations|to_batch|device|normalizer|unnormalizer)_processor")


def read_folder(folder: Path) -> dict:
    """What `load_il` returns of a LeRobot folder: its files as bytes, (size,) uint8 each, for a checkpoint to hold."""
    paths = [path for path in sorted(folder.iterdir()) if LEROBOT_FILES.fullmatch(path.name) and path.is_file()]
    links = [path.name for path in paths if not path.resolve().is_relative_to(folder.resolve())]
    if links:  # a checkpoint would hold, and give away, what they lead to
        raise UserError(f"{folder} is refused, {links[0]} is a link out of it: put the file itself there")
    lacking = [name for name in LEROBOT_NEEDED if name not in [path.name for path in paths]]
    if lacking:
        raise UserError(
            f"{folder} is not a policy of LeRobot, it lacks {', '.join(lacking)}: give the folder "
            "OUT/checkpoints/STEP/pretrained_model that lerobot-train wrote"
        )
    size = sum(path.stat().st_size for path in paths)
    if size > LEROBOT_LIMIT:
        raise UserError(f"{folder} holds {size / 2**20:.0f} MiB: at most {LEROBOT_LIMIT // 2**20} MiB can be a base")
    files = {path.name: torch.from_numpy(np.fromfile(path, dtype=np.uint8)) for path in paths}
    return {"script": "lerobot_policy", "files": files}


def parse_lerobot(name: str, content: torch.Tensor):
    """A LeRobot folder's file from its bytes: a .json parsed, a .safetensors its header; raises UserError if cut."""
    data = content.numpy().tobytes()
    if name.endswith(".json"):
        return json.loads(data)
    start = 8 + int.from_bytes(data[:8], "little")  # the header's size, the header, the tensors
    header = json.loads(data[8:start])
    end = start + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    if len(data) != end:
        raise UserError(f"{len(data)} bytes instead of {end}")
    return header


def check_sizes(value: object, name: str) -> None:
    """Raise UserError for numbers and lists, of the entry `name` of config.json, out of which no network is built."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else ((name, item) for item in value):
            check_sizes(item, key)
    largest = 400 if name in ("chunk_size", "horizon") else LEROBOT_LAYERS if "layers" in name else LEROBOT_LARGEST
    size = len(value) if isinstance(value, list) else abs(value) if isinstance(value, (int, float)) else 0
    if not size <= (LEROBOT_LAYERS if isinstance(value, list) else largest):  # which nan is not
        raise UserError(f"{name} is {value!r:.100}")


def check_shapes(network: torch.nn.Module, files: dict[str, torch.Tensor]) -> None:
    """Raise UserError unless model.safetensors has the names and shapes of the network, which is on "meta"."""
    expected = {name: list(x.shape) for name, x in network.state_dict().items()}
    header = parse_lerobot("model.safetensors", files["model.safetensors"])
    found = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        raise UserError(f"{odd[0]} is {found.get(odd[0])!r:.100}, not {expected.get(odd[0])}")


def check_lerobot(files: dict[str, torch.Tensor]) -> dict:
    """The config.json of a LeRobot folder's files; raises UserError, in one line, if they cannot be played as a base.

    It goes before LeRobot, which would import modules and download files that they name, and do without statistics.
    """
    if not isinstance(files, dict) or not all(LEROBOT_FILES.fullmatch(str(name)) for name in files):
        raise UserError(f"these are not the files of a LeRobot policy: {files!r:.100}")
    if not set(LEROBOT_NEEDED) <= files.keys():
        raise UserError(f"these are not the files of a LeRobot policy: {', '.join(map(repr, files))}")
    if not all(isinstance(x, torch.Tensor) and x.dtype == torch.uint8 and x.dim() == 1 for x in files.values()):
        raise UserError("the files of the LeRobot policy are no bytes")
    name, parsed = "", {}
    try:
        for name, content in files.items():
            parsed[name] = parse_lerobot(name, content)
        name = "config.json"
        config = parsed[name]
        features = {**config["input_features"], **config["output_features"]}
        shapes = {key: feature["shape"] for key, feature in features.items()}
        types = {key: feature["type"] for key, feature in features.items()}
        check_sizes(config, name)
        kind, history, scheduler = config["type"], config["n_obs_steps"], config.get("noise_scheduler_type", "DDIM")
        name = "policy_preprocessor.json or policy_postprocessor.json"
        steps = parsed["policy_preprocessor.json"]["steps"] + parsed["policy_postprocessor.json"]["steps"]
        steps = [(step.get("registry_name", step.get("class")), step.get("state_file")) for step in steps]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{name} of the LeRobot policy is damaged ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    if kind not in ("act", "diffusion"):
        raise UserError(f"the LeRobot policy must be of type act or diffusion, found {kind!r:.100}")
    if shapes != LEROBOT_FEATURES:
        raise UserError(
            f"the LeRobot policy must have the features {LEROBOT_FEATURES}, found {shapes!r:.100}: "
            "train it on a dataset of record_demos.py without --videos"
        )
    if types != LEROBOT_TYPES:  # for one of an image LeRobot would download a network that sees
        raise UserError(f"the LeRobot policy must have features of the types {LEROBOT_TYPES}, found {types!r:.100}")
    if history != 1 or scheduler != "DDIM":
        raise UserError(
            "a LeRobot diffusion policy must act from one observation and draw no noise as it goes: train it with "
            "--policy.n_obs_steps=1 --policy.noise_scheduler_type=DDIM (the latter also works in its config.json)"
        )
    for step, state_file in steps:
        if not LEROBOT_STEPS.fullmatch(str(step)):
            raise UserError(f"the LeRobot policy has a processor that is not known here: {step!r:.100}")
        if str(state_file) not in files and (state_file is not None or "normalizer" in step):
            raise UserError(f"the LeRobot policy lacks the statistics of its {step:.100}: {state_file!r:.100}")
    return config


class LeRobotNetwork:
    """A policy that LeRobot trained on a dataset of record_demos.py, run by LeRobot: its ACT, or its diffusion policy.

    The latter with DDIM (arXiv 2010.02502), from one noise for all observations, so that the base is a function of the
    observation. Args: `files`, what a `pretrained_model` folder holds, (size,) uint8 by name. Raises UserError, with
    one line for the user, if they cannot be played or LeRobot is not installed.
    """

    def __init__(self, files: dict[str, torch.Tensor]):
        config = check_lerobot(files)
        try:
            from draccus import decode
            from lerobot.configs.policies import PreTrainedConfig
            from lerobot.policies.factory import get_policy_class, make_pre_post_processors
            from safetensors.torch import load_model
        except ImportError as error:
            raise UserError(
                "a LeRobot policy needs LeRobot, 0.4.4 or newer, in an environment of its own that "
                f"tests/test_lerobot.py describes ({str(error).splitlines()[0]})"
            ) from error
        # The training's own random numbers go on as if this were not
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            for name, content in files.items():
                content.numpy().tofile(Path(folder, name))
            try:
                self.config = decode(PreTrainedConfig, {**config, "device": "cpu"})
                with torch.device("meta"):
                    check_shapes(get_policy_class(self.config.type)(self.config), files)
                self.policy = get_policy_class(self.config.type)(self.config).eval().requires_grad_(False)
                load_model(self.policy, Path(folder, "model.safetensors"))  # strict, as from_pretrained is not
                self.pre, self.post = make_pre_post_processors(
                    self.config, folder, preprocessor_overrides={"device_processor": {"device": "cpu"}}
                )
            except Exception as error:  # whatever LeRobot and its parsers raise
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"LeRobot cannot load the policy ({type(error).__name__}: {reason})") from error
        self.n_action_steps = self.config.n_action_steps
        if self.config.type == "act":
            self.chunk_size, coeff = self.config.chunk_size, self.config.temporal_ensemble_coeff
            self.temporal_ensemble_coeff = 0.0 if coeff is None else coeff or 1e-9  # LeRobot's 0.0 is the plain mean
        else:
            self.chunk_size, self.temporal_ensemble_coeff = self.n_action_steps, 0.0
            shape = (1, self.config.horizon, len(JOINTS))
            self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.device = "cpu"

    def to(self, device: torch.device | str) -> "LeRobotNetwork":
        """Move the policy; LeRobot's processors stay on the CPU."""
        self.policy.to(device)
        self.device = device
        return self

    def state_dict(self) -> dict:
        """Nothing: it is frozen."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def predict(self, state: torch.Tensor, environment_state: torch.Tensor) -> torch.Tensor:
        """Absolute joint targets (num, chunk_size, 6) for states (num, 6) and (num, 15), in LeRobot's units."""
        batch = self.pre({"observation.state": state, "observation.environment_state": environment_state})
        batch = {key: batch[key].to(self.device) for key in LEROBOT_FEATURES if key != "action"}
        if self.config.type == "act":
            return self.post(self.policy.predict_action_chunk(batch).cpu())
        history = {key: x[:, None] for key, x in batch.items()}  # (num, 1, ...)
        noise = self.noise.to(self.device).expand(len(state), -1, -1)
        return self.post(self.policy.diffusion.generate_actions(history, noise).cpu())


def make_network(state: dict) -> LeRobotNetwork:
    """The network of what `read_folder` returned; raises UserError as it does."""
    return LeRobotNetwork(state["files"])
