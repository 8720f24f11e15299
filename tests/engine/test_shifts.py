"""What of a run does not depend on a pixel: how `mini` sees the state in each step."""

import torch

from ebr_engine.engine.restorer import Restorer


def test_mini_leaves_less_of_its_grid():
    restorer = Restorer("mini", device="cpu")
    dark = torch.linspace(0.02, 0.2, 128).expand(3, 128, 128).contiguous()
    plan = restorer.plan("lowlight")

    def grid(picture):
        """Steps between rows and columns, at borders of 8 × 8 pixels over those within."""
        steps = [picture.diff(dim=axis).abs().mean((0, -1 if axis == -2 else -2)) for axis in (-1, -2)]
        return sum(float(s[7::8].mean() / s[torch.arange(len(s)) % 8 != 7].mean()) for s in steps)

    plain = type(plan)(plan.table, plan.tables)
    assert grid(restorer.restore(dark, plan=plan)) < 0.9 * grid(restorer.restore(dark, plan=plain))
