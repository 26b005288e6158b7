# SPDX-License-Identifier: Apache-2.0
"""Writes golden.json: values and gradients of the package rational-activations 0.2.0 in float64.

The package asks for a torch of 2020, so it is no dependency of the tests. To write the file again:

    pip install --no-deps rational-activations==0.2.0 && python tests/rational/golden.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

FILE = Path(__file__).with_name("golden.json")
DEGREES = [(5, 4), (3, 2), (7, 6)]


def main() -> None:
    from rational.torch import rational_pytorch_functions as peer  # type: ignore[import-not-found]

    functions = {
        "A": peer.Rational_PYTORCH_A_F,
        "B": peer.Rational_PYTORCH_B_F,
        "C": peer.Rational_PYTORCH_C_F,
        "D": peer.Rational_PYTORCH_D_F,
    }
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    cases = []
    for form, function in functions.items():
        for m, n in DEGREES:
            x, a, b, g = draw(32), draw(m + 1), draw(n + (form == "C")), draw(32)
            y = function(x, a, b, False)
            grads = torch.autograd.grad(y, (x, a, b), g.detach())
            names = ("x", "numerator", "denominator", "grad", "y", "grad_x", "grad_numerator", "grad_denominator")
            cases.append({"form": form} | dict(zip(names, (t.tolist() for t in (x, a, b, g, y, *grads)), strict=True)))
    FILE.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
