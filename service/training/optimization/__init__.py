"""How weights move: optimizers, their learning rate, and what is kept and decided beside them."""

from service.training.optimization.early_stopping import Patience
from service.training.optimization.ema import Ema
from service.training.optimization.gradient_noise import GradientNoise
from service.training.optimization.optimizers import build_optimizer
from service.training.optimization.scaler import LossScaler
from service.training.optimization.schedule import learning_rate_factor

__all__ = ["Ema", "GradientNoise", "LossScaler", "Patience", "build_optimizer", "learning_rate_factor"]
