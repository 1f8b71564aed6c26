"""Every extension point of ldm: signatures, shapes and units, a file per idea.  Read this first.

core: what all build on; data; autoencoder (stage 1); conditioning; diffusion (stage 2); sampling.  Nothing here imports another room.
"""

from ldm.interfaces.autoencoder import (
    Adversary,
    Autoencoder,
    AutoencoderLoss,
    Bottleneck,
    BottleneckOutput,
    Discriminator,
    Features,
    Posterior,
    Reconstruction,
    ReconstructionMetric,
)
from ldm.interfaces.conditioning import (
    AUGMENTED,
    ClassInput,
    Condition,
    Conditioner,
    ConditioningImage,
    Corruption,
    ImageInput,
    Input,
    NumberInput,
    TextInput,
)
from ldm.interfaces.core import Batch, Buildable, Cond, Denoise, Noise
from ldm.interfaces.data import TrainingData
from ldm.interfaces.diffusion import (
    Classifier,
    Denoiser,
    Guidance,
    Network,
    NoiseSchedule,
    Objective,
    Predict,
    Sampler,
    TimeSampler,
)
from ldm.interfaces.factory import Factory, argument, built, required
from ldm.interfaces.sampling import Task, TaskInput

__all__ = [
    "AUGMENTED", "Adversary", "Autoencoder", "AutoencoderLoss", "Batch", "Bottleneck", "BottleneckOutput", "Buildable", "ClassInput",
    "Classifier", "Cond", "Condition", "Conditioner", "ConditioningImage", "Corruption", "Denoise", "Denoiser", "Discriminator",
    "Factory", "Features", "Guidance", "ImageInput", "Input", "Network", "Noise", "NoiseSchedule", "NumberInput", "Objective",
    "Posterior", "Predict", "Reconstruction", "ReconstructionMetric", "Sampler", "Task", "TaskInput", "TextInput", "TimeSampler",
    "TrainingData", "argument", "built", "required",
]  # fmt: skip
