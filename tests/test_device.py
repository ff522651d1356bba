"""--device: the scripts on a GPU that is only pretended, so that the tests need none; devices that are not there."""

import json
import re
import weakref
from collections import Counter
from contextlib import suppress

import pytest
import torch
from test_imitation import TINY as IMITATION
from test_scripts import ROOT, TINY, run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import runs

ACT, DIFFUSION, RESIDUAL = (
    ROOT / "assets" / f"{name}.safetensors" for name in ("act", "diffusion_policy", "ppo_residual")
)
EVAL = f"--n-episodes 2 --policy hybrid --hybrid-bases jacobian il --il-checkpoint {DIFFUSION} --model-path"
EVAL += "".join(f" {path}" for path in sorted((ROOT / "assets").glob("*.safetensors")))
CHUNKS = "--dataset ../demos --chunk-size 16 --n-action-steps 16"
LONG = "--total-timesteps 416 --num-steps 208 --minibatch-size 104"  # until an episode is truncated
RUNS = [
    ("ppo_residual.py", f"{TINY['ppo_residual.py']} {LONG} --base-policy il --il-checkpoint {ACT}"),
    ("sac_residual.py", f"{TINY['sac_residual.py']} --prog-explore 24"),
    ("act.py", f"{IMITATION['act.py']} {CHUNKS} --dropout 0"),  # which is drawn where it is computed
    ("diffusion_policy.py", f"{IMITATION['diffusion_policy.py']} {CHUNKS}"),
    ("eval.py", f"{EVAL} --stochastic"),
    ("record_demos.py", f"--num-episodes 2 --policy il --il-checkpoint {ACT}"),
]
LAYERS = {"linear", "addmm", "mm", "bmm", "convolution", "native_layer_norm", "_transformer_encoder_layer_fwd"}


class PretendedGPU(TorchDispatchMode):
    """Has the CPU compute what is on the GPU, and fails where CUDA would, which is mostly where the two meet.

    Where a tensor is, its storage says, which its views share. `counts`: layers, optimizers' steps, random draws.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.there, self.storages, self.counts = True, weakref.WeakSet(), Counter()
        own = {name: getattr(torch.Tensor, name) for name in ("device", "numpy", "to", "__deepcopy__")}

        def to(x, *args, **kwargs):
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            x = x if dtype is None else own["to"](x, dtype)
            return x if device is None or device.type == x.device.type else self.put(x.clone(), device.type == "cuda")

        def numpy(x, **kwargs):
            if self.holds(x):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            return own["numpy"](x, **kwargs)

        device = property(lambda x: torch.device("cuda", 0) if self.holds(x) else own["device"].__get__(x))
        deepcopy = lambda x, memo: self.put(own["__deepcopy__"](x, memo), self.holds(x))  # noqa: E731
        methods = {"device": device, "numpy": numpy, "to": to, "cpu": lambda x: to(x, "cpu"), "__deepcopy__": deepcopy}
        for name, method in methods.items():
            monkeypatch.setattr(torch.Tensor, name, method)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: self.there)
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)  # optimizers ask its driver

    def holds(self, x):
        return x.untyped_storage() in self.storages

    def put(self, x, here=True):
        (self.storages.add if here else self.storages.discard)(x.untyped_storage())
        return x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = any(map(self.holds, tensors))
        if "cuda" in str(kwargs.get("device")):
            here, kwargs["device"] = True, "cpu"
        elif not tensors and torch._C._current_graph_task_id() >= 0:  # made in a backward pass, to go with the loss
            here = self.there
        elif name == "copy_":  # from one to the other
            here = self.holds(args[0])
        elif here:
            allowed = {id(x) for x in tensors if x.dim() == 0 and not re.match("_fused|cat|stack", name)}
            allowed -= {id(x) for x, arg in zip(args, func._schema.arguments, strict=False) if arg.is_write}
            if name in ("index", "index_put_") and self.holds(args[0]):
                allowed |= {id(x) for x in args[1]}
            if not all(self.holds(x) or id(x) in allowed for x in tensors):
                raise RuntimeError(f"{name}: expected all tensors on the same device, found cuda:0 and cpu")
        drawn = torch.Tag.nondeterministic_seeded in func.tags and not re.search("attention|dropout", name)
        kind = "layer" if name in LAYERS else "step" if "_fused_adam" in name else "draw" if drawn else ""
        self.counts[kind, "cuda" if here else "cpu"] += 1
        out = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, self.put, out) if here else out


@pytest.mark.parametrize(("name", "flags"), RUNS)
def test_a_run_on_the_gpu_is_that_on_the_cpu(name, flags, monkeypatch, tmp_path):
    if name in IMITATION:
        with suppress(SystemExit):  # as it ends
            run_script("record_demos.py", f"--num-episodes 1 --model-path {RESIDUAL}", monkeypatch, tmp_path)
    gpu, written = PretendedGPU(monkeypatch), []
    for device, here, elsewhere in (("auto", "cpu", "cuda"), ("cuda", "cuda", "cpu")):
        folder, gpu.there = tmp_path / device, device == "cuda"
        folder.mkdir()
        gpu.counts.clear()
        torch.manual_seed(0)
        with gpu, suppress(SystemExit):
            run_script(name, f"{flags} --device {device}", monkeypatch, folder)
        gpu.there = False  # whoever reads the files has none
        models = [runs.load_checkpoint(path)["model"] for path in sorted(folder.rglob("[bl]*t.safetensors"))]
        written.append([{key: x.tolist() for key, x in model.items()} for model in models])
        written[-1] += [json.loads(path.read_text())["policies"] for path in folder.rglob("results.json")]
        written[-1] += [path.read_bytes() for path in sorted(folder.rglob("*.parquet"))]
        assert gpu.counts["layer", here] and (gpu.counts["step", here] or name in ("eval.py", "record_demos.py"))
        assert not gpu.counts["layer", elsewhere] + gpu.counts["step", elsewhere]
        assert not gpu.counts["draw", "cuda"] or "--stochastic" in flags
    assert written[0] and written[0] == written[1]


def test_the_pretended_gpu_objects_where_cuda_does(monkeypatch):
    with PretendedGPU(monkeypatch):
        x, y, k = torch.ones(3, device="cuda"), torch.ones(3), torch.tensor([0, 2])
        assert runs.find_device("auto").type == runs.find_device("cuda").type == x.device.type == "cuda"
        for good in (x + torch.tensor(1.0), x[k], x[y > 0], x.clamp(0, 1)[1:], torch.zeros_like(x), y.to(x.device)):
            assert good.device == x.device
        assert x.cpu().device == y.copy_(x).device == torch.device("cpu") and x.sum().item() == 3.0
        adds = (lambda: x + y, lambda: y.add_(x.sum()), lambda: torch.cat([x, y]), lambda: torch.stack([x[0], y[0]]))
        for bad in (*adds, lambda: y[k.to("cuda")], lambda: torch.nn.Linear(3, 1)(x), lambda: x.numpy()):
            with pytest.raises((RuntimeError, TypeError), match="device"):
                bad()


@pytest.mark.parametrize("name", [*TINY, *IMITATION, "eval.py", "record_demos.py"])
def test_a_device_that_is_not_there_is_told_and_nothing_is_written(name, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(runs.UserError, match="--device cuda"):
        run_script(name, "--device cuda", monkeypatch, tmp_path)
    assert not list(tmp_path.iterdir())
