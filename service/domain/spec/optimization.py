"""How weights follow gradients."""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from service.domain.spec.base import STORED, MetricName, SpecModel, problem

LearningRate = Annotated[float, Field(gt=0, le=1e6)]
WeightDecay = Annotated[float, Field(ge=0, le=1e3)]
DecayNormAndBias = Annotated[bool, Field(description="whether γ, β and biases decay too")]


class SgdSpec(SpecModel):
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD``."""

    name: Literal["sgd"] = "sgd"
    learning_rate: LearningRate = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: WeightDecay = 0.0
    decay_norm_and_bias: DecayNormAndBias = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise problem("nesterov", "needs momentum > 0. Set optimizer.momentum, or nesterov: false.")
        return self


class AdamWSpec(SpecModel):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as ``torch.optim.AdamW``."""

    name: Literal["adamw"]
    learning_rate: LearningRate = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: WeightDecay = 0.01
    decay_norm_and_bias: DecayNormAndBias = False


class LarsSpec(SpecModel):
    """Layer-wise adaptive rate scaling for large batches (You et al. 2017)."""

    name: Literal["lars"]
    learning_rate: LearningRate = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: WeightDecay = 1e-4
    trust_coefficient: Annotated[float, Field(gt=0, le=1)] = 1e-3
    eps: Annotated[float, Field(ge=0, le=1)] = 1e-8
    decay_norm_and_bias: DecayNormAndBias = False


OptimizerSpec = Annotated[SgdSpec | AdamWSpec | LarsSpec, Field(discriminator="name")]


class ScheduleSpec(SpecModel):
    """The learning rate over the steps: a linear warm-up, then one of the usual ways down.

    ``cosine`` is half a cosine (Loshchilov & Hutter 2017), ``polynomial`` a falling power, ``linear`` a straight line,
    ``step`` a factor at each milestone; ``constant`` stays.
    """

    name: Literal["constant", "cosine", "linear", "polynomial", "step"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    final_fraction: Annotated[float, Field(ge=0, le=1, description="of the base rate, at the last step")] = 0.0
    power: Annotated[float, Field(gt=0, le=10, description="of ``polynomial``")] = 0.9
    milestones: Annotated[
        tuple[Annotated[int, Field(ge=1, le=10**9)], ...], Field(max_length=64, description="steps of ``step``")
    ] = ()
    gamma: Annotated[float, Field(gt=0, le=1, description="what each milestone multiplies the rate by")] = 0.1

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> Self:
        if (self.name == "step") != bool(self.milestones):
            raise problem(
                "milestones",
                "name: step needs some, and no other schedule has any. Add or remove them, or choose another name.",
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise problem("milestones", "have to grow from one to the next. Sort them, and name each once.")
        return self


class EmaSpec(SpecModel):
    """An exponential moving average of the weights and the running statistics, which is what is evaluated."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class EarlyStoppingSpec(SpecModel):
    """End the job, as succeeded, when a metric of the evaluations no longer improves."""

    metric: MetricName
    mode: Literal["min", "max"]
    patience: Annotated[int, Field(ge=1, le=10**6, description="evaluations without an improvement")] = 5
    min_delta: Annotated[float, Field(ge=0, le=1e9, description="what counts as one")] = 0.0

    @model_validator(mode="after")
    def _metric_is_evaluated(self, info: ValidationInfo) -> Self:
        if info.context is not STORED and not self.metric.startswith("eval/"):
            raise problem("metric", f"{self.metric} is no metric of the evaluations. Use one of eval/, as eval/loss.")
        return self
