"""Build the wheel and the sdist, check what they hold, and use the wheel in clean environments: ``make package``.

    python .ci/package.py                                        this Python, torch as pinned in constraints.txt
    python .ci/package.py --python python3.12 --torch 2.11.0     others; each may be given several times

It runs in an environment that has ``build`` and ``twine``. What is used lies in ``dist/`` afterwards.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PACKAGES = {"apo", "apo_kernels"}

USE = """
import importlib.util, torch, apo, apo_kernels as ak

assert importlib.util.find_spec("benchmarks") is None, "a package named benchmarks was installed"
assert apo.__version__ == ak.__version__ == "{version}", apo.__version__
assert "site-packages" in apo.__file__, apo.__file__

model = torch.nn.Linear(4, 3)
x, t = torch.randn(8, 4), torch.randint(3, (8,))
loss = torch.nn.functional.cross_entropy
objective = apo.ProximalObjective(model, lambda: (x, t), loss=loss)
for optimizer in (apo.APO(model, objective), apo.AdaptiveLR(torch.optim.AdamW(model.parameters()), objective)):
    before = model.weight.detach().clone()
    optimizer.zero_grad()
    loss(model(x), t).backward()
    optimizer.step()
    assert optimizer.metrics()["accepted"] == 1
    assert not torch.equal(before, model.weight)

G, S = torch.randn(5, 7), torch.ones(5, 7)
A, B = ak.identity_block(7, 2), ak.identity_block(5)
torch.testing.assert_close(torch.ops.apo_kernels.precondition(G, A, B, S, None), G)
torch.library.opcheck(torch.ops.apo_kernels.precondition, (G, A, B, S, None))
compiled = torch.compile(ak.precondition, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(G, A, B, S), G)
print("torch", torch.__version__, "--", ak.explain())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="an interpreter (default: this one)")
    parser.add_argument("--torch", action="append", help="a version of torch (default: the pinned one)")
    options = parser.parse_args()
    wheel, sdist = build()
    version = wheel.name.split("-")[1]
    check_wheel(wheel)
    check_sdist(sdist)
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    for python, torch in product(options.python or [sys.executable], options.torch or [pinned[1]]):
        use(wheel, version, python, torch)
    print(f"{wheel.name} and {sdist.name} are fit to be released")


def build() -> tuple[Path, Path]:
    """The wheel is built from the sdist, so that the sdist is known to hold what that takes."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    return wheel, sdist


def check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == PACKAGES, f"the wheel must hold {sorted(PACKAGES)} alone, but holds {sorted(top)}"
    for package in PACKAGES:
        assert f"{package}/py.typed" in names, f"the wheel must hold {package}/py.typed"
    assert any(name.endswith("licenses/LICENSE") for name in names), "the wheel must hold LICENSE"


def check_sdist(sdist: Path) -> None:
    """It holds every file that git tracks."""
    if not (ROOT / ".git").exists():
        return
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    missing = [name for name in listed.stdout.splitlines() if name not in held and (ROOT / name).exists()]
    assert not missing, f"the sdist must hold every tracked file, but lacks {missing[:9]}"


def use(wheel: Path, version: str, python: str, torch: str) -> None:
    """Install the wheel in an environment of its own, and use it from another folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        run(python, "-m", "venv", environment)
        own = environment / "bin" / "python"
        run(own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"torch=={torch}", wheel)
        run(own, "-m", "pip", "check", "--disable-pip-version-check")
        run(own, "-I", "-c", USE.format(version=version), cwd=folder)


def run(*command: object, cwd: str | Path = ROOT) -> None:
    words = [str(word) for word in command]
    print("+", *(word for word in words if "\n" not in word), flush=True)
    subprocess.run(words, cwd=cwd, check=True)


if __name__ == "__main__":
    main()
