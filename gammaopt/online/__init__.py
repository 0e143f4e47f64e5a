"""One-pass training: streams of fresh batches, the paper's models, one run, and the record it leaves.

Data flows one way: a stream gives batches, :func:`train` consumes them, a :class:`RunRecord` comes out.
"""

from gammaopt.online.ensemble import Progress as Progress
from gammaopt.online.ensemble import StopTraining as StopTraining
from gammaopt.online.ensemble import train_many as train_many
from gammaopt.online.models import CNN as CNN
from gammaopt.online.models import MLP as MLP
from gammaopt.online.models import ResNet18 as ResNet18
from gammaopt.online.models import ViT as ViT
from gammaopt.online.models import build_model as build_model
from gammaopt.online.record import Curve as Curve
from gammaopt.online.record import RunRecord as RunRecord
from gammaopt.online.streams import Digits as Digits
from gammaopt.online.streams import Hermite as Hermite
from gammaopt.online.streams import Parity as Parity
from gammaopt.online.streams import Photos as Photos
from gammaopt.online.streams import Staircase as Staircase
from gammaopt.online.streams import Stream as Stream
from gammaopt.online.streams import Teacher as Teacher
from gammaopt.online.streams import build_stream as build_stream
from gammaopt.online.tasks import TASKS as TASKS
from gammaopt.online.tasks import Task as Task
from gammaopt.online.tasks import get_task as get_task
from gammaopt.online.train import Recipe as Recipe
from gammaopt.online.train import Run as Run
from gammaopt.online.train import train as train

__all__ = [
    "CNN",
    "MLP",
    "TASKS",
    "Curve",
    "Digits",
    "Hermite",
    "Parity",
    "Photos",
    "Progress",
    "Recipe",
    "ResNet18",
    "Run",
    "RunRecord",
    "Staircase",
    "StopTraining",
    "Stream",
    "Task",
    "Teacher",
    "ViT",
    "build_model",
    "build_stream",
    "get_task",
    "train",
    "train_many",
]
