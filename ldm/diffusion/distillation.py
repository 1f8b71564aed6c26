"""Few-step sampling: a student whose every step does what many steps of a trained model do."""

from itertools import pairwise

import torch
from torch import Tensor

from ldm.devices import factor, send
from ldm.diffusion.objective import Wrapper
from ldm.draws import Draws
from ldm.errors import UserError
from ldm.interfaces import Cond, Denoise, Denoiser, Guidance, NoiseSchedule, Objective


class ProgressiveDistillation(Wrapper):
    """Another objective whose z0 is the one that takes a DDIM step of the student to where `substeps` DDIM steps of the teacher end
    (Algorithm 2, arXiv:2202.00512, there with 2 substeps and many rounds; guidance distilled too: arXiv:2210.03142).

    teacher: model folder or checkpoint, whose weights the student starts from (model.init).  The student is sampled with `steps` steps of
    DDIM, without guidance.  guidance: of the teacher, by default its own.
    """

    def __init__(self, objective: Objective, teacher: str, steps: int = 4, substeps: int = 8, guidance: Guidance | None = None) -> None:
        super().__init__(objective)
        if steps < 1 or substeps < 1:
            raise UserError(f"ProgressiveDistillation has steps {steps} and substeps {substeps}; both are at least 1")
        self.teacher, self.steps, self.substeps, self.guidance = teacher, steps, substeps, guidance

    def draw(self, z0: Tensor, schedule: NoiseSchedule, draws: Draws) -> tuple[Tensor, Tensor]:
        """Only the levels at which the student will be called."""
        noise, _ = self.objective.draw(z0, schedule, draws)
        starts = schedule.t(schedule.steps(self.steps)[:-1])
        return noise, send(starts[(draws.uniform() * self.steps).long()], z0.device)

    def loss(self, denoiser: Denoiser, z0: Tensor, noise: Tensor, t: Tensor, cond: Cond, teacher: Denoise | None = None) -> Tensor:
        assert teacher is not None
        levels = send(denoiser.schedule.steps(self.steps * self.substeps), t.device)
        first = (levels[:: self.substeps] - denoiser.schedule.sigma(t)[:, None]).abs().argmin(1) * self.substeps
        path = levels[first[:, None] + torch.arange(self.substeps + 1, device=t.device)]  # (B, substeps + 1)
        end = x = z0 + factor(path[:, 0], z0) * noise
        with torch.no_grad():
            for s, s_next in pairwise(path.unbind(1)):
                end = torch.lerp(teacher(end, s), end, factor(s_next / s, x))
        left = factor(path[:, -1] / path[:, 0], x)
        return self.objective.error(denoiser, denoiser.raw(x, path[:, 0], cond), x, (end - left * x) / (1 - left), path[:, 0])
