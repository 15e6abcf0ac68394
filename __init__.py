"""ViTSimple: a plain Vision Transformer for the Hugging Face Hub.

Importing this package registers its classes, so that the Auto classes load a checkpoint without `trust_remote_code`.
"""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_vit_simple import VARIANTS, ViTSimpleConfig
from .modeling_vit_simple import ViTSimpleBackbone, ViTSimpleForImageClassification, ViTSimpleModel

__version__ = "0.2.0"
__all__ = ["VARIANTS", "ViTSimpleBackbone", "ViTSimpleConfig", "ViTSimpleForImageClassification", "ViTSimpleModel"]

AutoConfig.register("vit_simple", ViTSimpleConfig)
AutoModel.register(ViTSimpleConfig, ViTSimpleModel)
AutoModelForImageClassification.register(ViTSimpleConfig, ViTSimpleForImageClassification)
AutoBackbone.register(ViTSimpleConfig, ViTSimpleBackbone)

# This makes save_pretrained copy the two model files beside the weights.
ViTSimpleConfig.register_for_auto_class("AutoConfig")
ViTSimpleModel.register_for_auto_class("AutoModel")
ViTSimpleForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViTSimpleBackbone.register_for_auto_class("AutoBackbone")
