# SPDX-License-Identifier: Apache-2.0
"""Exports the package to build/hub/ as Hugging Face's `kernels` loads it. `make hub CUDA=...` runs it, in make's
environment.

    hub.py cpu|cu12|cu13        adds one variant, such as build/hub/build/torch-stable-abi210-cpu-x86_64-linux/

A variant is what a wheel has, without its command line. It is imported under a name of its own, which is also the
namespace of its ops: so several versions can be loaded in one process. The name has the commit in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import wheels

HUB = wheels.ROOT / "build" / "hub"
NAME = "singlepass"
LEFT_OUT = ("bench", "__main__.py", "_cli.py")
CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels]
---
# singlepass

Fused optimizers, KAN activations, KV-cache compression and sparse spectral training for PyTorch.

```python
from kernels import get_kernel

singlepass = get_kernel("<this repository>", version={version})
optimizer = singlepass.optim.Lion(model.parameters(), lr=1e-4)
```
"""


def digest(variant: Path) -> dict[str, object]:
    """The hash of each file, as `kernels` compares them."""
    files = [path for path in sorted(variant.rglob("*")) if path.is_file()]
    hashes = {p.relative_to(variant).as_posix(): hashlib.sha256(p.read_bytes()).digest() for p in files}
    return {"algorithm": "sha256", "files": {name: base64.b64encode(h).decode() for name, h in hashes.items()}}


def export(wheel: Path, identifier: str, hub: Path) -> Path:
    """The variant of a wheel that was built in the namespace of this name."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch)
        package = Path(scratch, NAME)
        for name in LEFT_OUT:
            shutil.rmtree(package / name) if (package / name).is_dir() else (package / name).unlink()
        info = json.loads((package / "build_info.json").read_text())
        built = next(iter(info["cuda"].values()), None)
        cuda = f"cu{built['version'].replace('.', '')}" if built else "cpu"
        target = int(info["torch_target"], 16)  # 0x020a...: 2.10
        abi = f"{target >> 56}{target >> 48 & 0xFF}"
        variant = hub / "build" / f"torch-stable-abi{abi}-{cuda}-{info['machine']}-linux"
        shutil.rmtree(variant, ignore_errors=True)
        shutil.copytree(package, variant)
    version = int(info["version"].split(".")[0])
    metadata = {"name": NAME, "id": identifier, "version": version, "license": "Apache-2.0", "python-depends": []}
    backend = {"type": "cuda", "archs": built["archs"].split(";")} if built else {"type": "cpu"}
    metadata |= {"backend": backend, "digest": digest(variant)}
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (hub / "README.md").write_text(CARD.format(version=version))
    return variant


def main(kind: str) -> None:
    if wheels.run("git", "status", "--porcelain"):
        raise SystemExit("hub: expected a clean tree, whose commit names what is exported; got changes. Commit them.")
    identifier = f"{NAME}_{kind}_{wheels.run('git', 'rev-parse', '--short=10', 'HEAD').strip()}"
    variant = export(wheels.build(kind, local=False, SINGLEPASS_NAMESPACE=identifier), identifier, HUB)
    print(f"{variant.relative_to(wheels.ROOT)}: {identifier}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("cpu", "cu12", "cu13"):
        raise SystemExit(f"make hub: expected CUDA=cpu, cu12 or cu13; got {' '.join(sys.argv[1:]) or 'none'}.")
    main(sys.argv[1])
