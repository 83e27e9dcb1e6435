"""Settings of ways to train that any task can use."""

from pydantic import Field

from launcher.recipe.section import Section


class EmaSection(Section):
    """Keep an exponential moving average of the trained weights (Polyak and Juditsky 1992), in fp32."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """After each step the average is decay x average + (1 - decay) x weights; it begins with the first weights."""
    warmup: bool = False
    """Forget faster at first: the decay of step n is at most (1 + n) / (10 + n)."""
    use: bool = True
    """Evaluate and export the averaged weights; false: only keep them, for `zerofleet export --ema`."""
