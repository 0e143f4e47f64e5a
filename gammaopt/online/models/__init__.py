"""The paper's four architectures, parametric in width and depth, and any network of timm or torchvision by name."""

from gammaopt.online.models._build import MODELS as MODELS
from gammaopt.online.models._build import build_model as build_model
from gammaopt.online.models._plain import CNN as CNN
from gammaopt.online.models._plain import MLP as MLP
from gammaopt.online.models._resnet import ResNet18 as ResNet18
from gammaopt.online.models._vit import ViT as ViT

__all__ = ["CNN", "MLP", "MODELS", "ResNet18", "ViT", "build_model"]
