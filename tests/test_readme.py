"""The documentation: its copy of a script works as it stands there; its links, tables and versions are true."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "assets/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text()


def copy_block():
    """The commands of the README's section 'Copy a script': how it is made, its training, and what follows."""
    section = README[README.index("## Copy a script") :]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    made, train, after = re.split(r"^(python mine\.py --third.*\n)", block, flags=re.MULTILINE)
    return made, train, after


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the project in which the README's section was followed, Ctrl-C included; and what that printed."""
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "assets", folder / "assets")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    options = {"cwd": folder, "env": {**os.environ, "PATH": path}, "text": True}
    made, train, after = copy_block()

    def follow(commands):
        bash = ["bash", "-euo", "pipefail", "-c", commands]
        done = subprocess.run(bash, **options, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    follow(made)
    started = subprocess.Popen(shlex.split(train, comments=True), **options, stderr=subprocess.PIPE)
    while started.poll() is None and not list(folder.glob("runs/mine__1__*/state.safetensors")):
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    printed = started.communicate(timeout=300)[1] + follow(after)
    return folder, printed


def test_the_readme_is_short_and_its_test_command_can_be_found():
    lines = README.splitlines()
    assert len(lines) <= 220
    first = next(line for line in lines if "-m pytest" in line)  # what .ci/run takes
    assert first.startswith("python3 -m venv .venv && ") and first.endswith(" -m pytest")


def test_the_copy_is_stopped_goes_on_and_is_played(copied):
    folder, printed = copied
    (run_dir,) = folder.glob("runs/mine__1__*")
    command = re.search(r"stopped; go on with: (.*)", printed)[1]
    assert shlex.split(command) == ["python", "mine.py", "--resume", str(run_dir.relative_to(folder))]
    checkpoint = load_checkpoint(run_dir / "last.safetensors")
    assert checkpoint["script"] == "mine" and checkpoint["global_step"] == checkpoint["args"]["total_timesteps"]
    shapes = {tuple(weight.shape) for name, weight in checkpoint["model"].items() if "actor" in name}
    assert (6, 16) in shapes and checkpoint["args"]["third_size"] == 16
    assert set(json.loads((folder / "eval_results/results.json").read_text())["policies"]) == {
        "base jacobian",
        "mine seed 1",
    }
    assert (run_dir / "mine.py").read_bytes() == (folder / "mine.py").read_bytes()


def test_a_run_writes_the_files_that_are_documented(copied):
    folder, _ = copied
    (run_dir,) = folder.glob("runs/mine__1__*")
    page = (ROOT / "docs/files.md").read_text().replace("SCRIPT", "mine")
    table = re.search(r"## A run's.*?((?:^\|[^\n]*\n)+)", page, re.DOTALL | re.MULTILINE)[1]
    documented = {name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    written = {re.sub(r"tfevents\..*", "tfevents.*", path.name) for path in run_dir.iterdir()}
    assert documented == written | {"episode.mp4"}  # that one only with --capture-video


def test_links_lead_somewhere():
    count = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists() and file.is_relative_to(ROOT), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in anchors, f"{page.name}: {target}"
            count += 1
    assert count > 30
    linked = {path.name for path in PAGES if path.name in README}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= linked


def test_tables_are_those_of_the_measurements():
    measured = (ROOT / "results/table.md").read_text()
    shown = [
        table
        for page in PAGES
        for table in re.findall(r"^\|.*(?:\bpoints|interquartile).*\n(?:\|.*\n)+", page.read_text(), re.MULTILINE)
    ]
    assert len(shown) >= 6
    for table in shown:
        assert table in measured


def test_the_diff_is_as_long_as_the_readme_says():
    diff = subprocess.run(["diff", "ppo.py", "ppo_residual.py"], cwd=ROOT, capture_output=True, text=True).stdout
    hunks, lines = (len(re.findall(pattern, diff, re.MULTILINE)) for pattern in (r"^\d", "^[<>]"))
    assert f"in {hunks} hunks and {lines} lines" in README


def test_versions_agree():
    """Ruff's in the pre-commit hooks and in the tests; Python's in the README and in the workflow."""
    (pinned,) = re.findall(r"^ruff==.*", (ROOT / "tests/requirements.txt").read_text(), re.MULTILINE)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {pinned}
    low, high = (int(minor) for minor in re.search(r"Python 3\.(\d+) to 3\.(\d+)", README).groups())
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    assert [int(minor) for minor in re.findall(r'"3\.(\d+)"', workflow)] == list(range(low, high + 1))
    assert "bash .ci/run" in workflow
