"""Which images a request makes: a prompt and a seed each. Knows no pipeline and makes none of them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sdtrt.specs import GenerateSpec

RANDOM_SEEDS = 2**32


@dataclass(frozen=True)
class Job:
    """One image to be made; its negative prompt is its request's, where it has none of its own."""

    prompt: str
    seed: int
    negative_prompt: str | None = None


class JobList(Protocol):
    """Images to be made, one after the other."""

    def __len__(self) -> int:
        """How many there are."""

    def batch(self, first: int, size: int) -> list[Job]:
        """The jobs from the number `first` on: `size`, or as many as there are."""


@dataclass(frozen=True)
class ChosenJobs:
    """Images that have nothing in common but the call that makes them: each has its own prompt and seed."""

    jobs: tuple[Job, ...]

    def __len__(self) -> int:
        return len(self.jobs)

    def batch(self, first: int, size: int) -> list[Job]:
        """The jobs from the number `first` on: `size`, or as many as there are."""
        return list(self.jobs[first : first + size])


@dataclass(frozen=True)
class Jobs:
    """All the images of a request, prompt after prompt: each prompt starts at the first seed and counts up from it.

    A job is made when it is asked for: a request may be for tens of millions.
    """

    prompts: tuple[str, ...]
    num_images: int
    first_seed: int

    @classmethod
    def of(cls, spec: GenerateSpec) -> Jobs:
        """The images of a request, from its seed on, or from a random one."""
        first = spec.seed if spec.seed is not None else secrets.randbelow(RANDOM_SEEDS)
        return cls(spec.prompts, spec.num_images, first)

    def __len__(self) -> int:
        return len(self.prompts) * self.num_images

    def batch(self, first: int, size: int) -> list[Job]:
        """The jobs from the number `first` on: `size`, or as many as there are."""
        return [self._job(number) for number in range(first, min(first + size, len(self)))]

    def _job(self, number: int) -> Job:
        prompt, image = divmod(number, self.num_images)
        return Job(self.prompts[prompt], self.first_seed + image)


def batch_name(batch: Sequence[Job], number: int, count: int) -> str:
    """What a batch is called while it is made; `number` is that of its first image."""
    seeds = ", ".join(f"{job.seed}" for job in batch)
    if len(batch) > 1:
        return f"images {number} to {number + len(batch) - 1} of {count}, seeds {seeds}"
    return f"seed {seeds}" if count == 1 else f"image {number} of {count}, seed {seeds}"
