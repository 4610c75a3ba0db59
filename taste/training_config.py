"""How to train."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingConfig:
    """How to train."""

    num_epochs: int
    batch_size: int  # utterances that a process looks at together
    lr: float  # peak of the schedule, of the parts that the model folder holds
    new_modules_lr: float  # the same of all others, which have everything to learn
    warmup_steps: int
    weight_decay: float
    grad_clip: float  # largest norm of the gradient
    accumulation_steps: int  # batches whose gradients make one step
    seed: int
    checkpoint_every: int = 0  # steps; 0: none by their number
    checkpoint_minutes: float = 0  # since the last one; 0: none by the clock. One is written after each epoch anyway
    num_workers: int = 0  # processes that load features

    def __post_init__(self) -> None:
        least = {"num_epochs": 0, "batch_size": 1, "warmup_steps": 0, "weight_decay": 0, "accumulation_steps": 1}
        least |= {"checkpoint_every": 0, "checkpoint_minutes": 0, "num_workers": 0}
        problems = [
            f"{name.upper()} is {vars(self)[name]}, expected {low} or more"
            for name, low in least.items()
            if vars(self)[name] < low
        ]
        problems += [
            f"{name.upper()} is {vars(self)[name]}, expected more than 0"
            for name in ("lr", "new_modules_lr", "grad_clip")
            if vars(self)[name] <= 0
        ]
        if problems:
            raise ValueError("; ".join(problems))
